//! What the files allow, and what of each read is in the page cache.

use tensorhaul_io::{Access, Residency, probe};
use tensorhaul_plan::Plan;

use crate::model::Inner;
use crate::options::{EngineChoice, LoadOptions};
use crate::report::Fallback;

/// What the files allow.
pub(crate) struct Probed {
    /// By file; empty when the files are bytes in memory.
    pub(crate) residency: Vec<Residency>,
    pub(crate) direct_align_bytes: u64,
    pub(crate) fallbacks: Vec<Fallback>,
}

impl Probed {
    /// Asks the page cache about every file, and tries direct reads on those that it does not hold.
    pub(crate) fn new(model: &Inner, options: &LoadOptions) -> Probed {
        let mut probed = Probed { residency: Vec::new(), direct_align_bytes: 1, fallbacks: Vec::new() };
        let mut refused: Vec<(String, u64)> = Vec::new();
        for file in model.files() {
            let residency = probe::residency(file.cached(), 0, file.len_bytes());
            probed.residency.push(residency);
            if residency == Residency::Hot || options.engine == EngineChoice::Mmap {
                continue;
            }
            match file.probe_direct() {
                Ok(direct) => probed.direct_align_bytes = probed.direct_align_bytes.max(direct.align_bytes),
                Err(refusal) => match refused.iter_mut().find(|(why, _)| *why == refusal.to_string()) {
                    Some((_, files)) => *files += 1,
                    None => refused.push((refusal.to_string(), 1)),
                },
            }
        }
        let told = refused.into_iter().map(|(why, files)| {
            let files = if files == 1 { "1 file is".to_owned() } else { format!("{files} files are") };
            Fallback::new(format!("{files} read through the page cache instead of past it"), why)
        });
        probed.fallbacks.extend(told);
        probed
    }
}

/// Hot or cold, for every read.
pub(crate) struct Temperatures {
    pub(crate) access: Vec<Access>,
    pub(crate) hot_bytes: u64,
    pub(crate) direct_bytes: u64,
}

impl Temperatures {
    pub(crate) fn new(model: &Inner, plan: &Plan, probed: &Probed) -> Temperatures {
        let mut temperatures =
            Temperatures { access: Vec::with_capacity(plan.reads().len()), hot_bytes: 0, direct_bytes: 0 };
        for read in plan.reads() {
            let extent = read.extent;
            let file = model.files().get(extent.file as usize);
            let is_hot = match (file, probed.residency.get(extent.file as usize)) {
                (Some(file), Some(Residency::Mixed)) => {
                    probe::residency(file.cached(), extent.offset_bytes, extent.len_bytes) == Residency::Hot
                }
                (Some(_), Some(residency)) => *residency == Residency::Hot,
                _ => true, // Bytes in memory.
            };
            // Direct reads need the covers that only a plan with an alignment has.
            let able =
                plan.machine().direct_align_bytes > 1 && file.is_some_and(|file| file.direct().is_some());
            let is_direct = !is_hot && able;
            temperatures.hot_bytes += if is_hot { plan.payload_bytes(read) } else { 0 };
            temperatures.direct_bytes += if is_direct { extent.len_bytes } else { 0 };
            temperatures.access.push(if is_direct { Access::Direct } else { Access::Cached });
        }
        temperatures
    }

    /// Returns the reads of one kind, in order.
    pub(crate) fn reads(&self, access: Access) -> Vec<u32> {
        (0..self.access.len() as u32).filter(|read| self.access[*read as usize] == access).collect()
    }
}
