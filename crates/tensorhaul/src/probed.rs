//! What the files allow, and what of each read is in the page cache.

use tensorhaul_io::{Access, Residency, probe};
use tensorhaul_plan::Plan;

use crate::model::Inner;
use crate::options::{EngineChoice, LoadOptions};
use crate::report::Fallback;
use crate::storage::is_by_storage;

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
            let refusal = match file.probe_direct() {
                Ok(_) if residency == Residency::Unknown => UNKNOWN_RESIDENCY.to_owned(),
                Ok(direct) => {
                    probed.direct_align_bytes = probed.direct_align_bytes.max(direct.align_bytes);
                    continue;
                }
                Err(refusal) => refusal.to_string(),
            };
            match refused.iter_mut().find(|(why, _)| *why == refusal) {
                Some((_, files)) => *files += 1,
                None => refused.push((refusal, 1)),
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
    /// Bytes of tensors that the page cache holds, and those it does not.
    pub(crate) hot_bytes: u64,
    pub(crate) cold_bytes: u64,
    pub(crate) direct_bytes: u64,
    /// Bytes that storage writes straight into a device.
    pub(crate) storage_bytes: u64,
    /// Whether storage does each read.
    by_storage: Vec<bool>,
}

impl Temperatures {
    pub(crate) fn new(model: &Inner, plan: &Plan, probed: &Probed) -> Temperatures {
        let access = Vec::with_capacity(plan.reads().len());
        let mut temperatures = Temperatures {
            access,
            hot_bytes: 0,
            cold_bytes: 0,
            direct_bytes: 0,
            storage_bytes: 0,
            by_storage: plan.reads().iter().map(|read| is_by_storage(plan, read)).collect(),
        };
        for (number, read) in plan.reads().iter().enumerate() {
            let extent = read.extent;
            let file = model.files().get(extent.file as usize);
            let residency = match (file, probed.residency.get(extent.file as usize)) {
                (Some(file), Some(Residency::Mixed)) => {
                    probe::residency(file.cached(), extent.offset_bytes, extent.len_bytes)
                }
                (Some(_), Some(residency)) => *residency,
                _ => Residency::Hot, // Bytes in memory.
            };
            let is_hot = residency == Residency::Hot;
            // Direct reads need the covers that only a plan with an alignment has.
            let able =
                plan.machine().direct_align_bytes > 1 && file.is_some_and(|file| file.direct().is_some());
            // Reads of pieces are never aligned.
            let is_past_cache = !is_hot && residency != Residency::Unknown && able && read.stride.is_none();
            let is_by_storage = temperatures.by_storage[number];
            let is_direct = is_by_storage || is_past_cache;
            let bytes = if is_hot { &mut temperatures.hot_bytes } else { &mut temperatures.cold_bytes };
            *bytes += read.payload_bytes;
            temperatures.direct_bytes += if is_direct { extent.len_bytes } else { 0 };
            temperatures.storage_bytes += if is_by_storage { extent.len_bytes } else { 0 };
            temperatures.access.push(if is_direct { Access::Direct } else { Access::Cached });
        }
        temperatures
    }

    /// Walks the reads of one kind that the host does, in order.
    pub(crate) fn reads(&self, access: Access) -> impl Iterator<Item = u32> {
        self.reads_by_host().filter(move |read| self.access[*read as usize] == access)
    }

    /// Walks the reads that the host does, in order.
    pub(crate) fn reads_by_host(&self) -> impl Iterator<Item = u32> {
        (0..self.access.len() as u32).filter(|read| !self.by_storage[*read as usize])
    }

    /// Walks the reads that storage does, in order.
    pub(crate) fn reads_by_storage(&self) -> impl Iterator<Item = u32> {
        (0..self.access.len() as u32).filter(|read| self.by_storage[*read as usize])
    }
}

/// Why a file that could be read directly is not: on an overlay (Linux 6.18) neither cachestat nor RWF_NOWAIT
/// sees the pages of the file below. Reading past pages that are there costs 5 times the time, reading through a
/// cache that is empty 1.5 times, so the doubt goes to the page cache.
const UNKNOWN_RESIDENCY: &str = "its filesystem does not tell what of it the page cache holds";
