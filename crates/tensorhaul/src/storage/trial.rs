//! Which files storage reads into which device: planned with hope, tried, and planned anew where one is refused.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use tensorhaul_device::Device;
use tensorhaul_direct::{DirectFile, Library, Probe, Refusal};
use tensorhaul_io::{OpenFile, Residency};
use tensorhaul_plan::{DeviceId, Place, Plan, Route, plan::Target};

use super::{Storage, is_by_storage, route_for};
use crate::error::{Error, Result};
use crate::model::{Inner, Source};
use crate::options::{LoadOptions, Preference};
use crate::prepare::timed;
use crate::probed::Probed;

/// A device that storage may read into; nothing was tried yet.
pub(crate) struct Hope<'h> {
    device: &'h Arc<dyn Device>,
    model: &'h Inner,
    options: &'h LoadOptions,
    /// Why a file is not even tried; by file.
    ruled_out: Vec<Option<&'static str>>,
}

impl<'h> Hope<'h> {
    /// Rules out what needs no trial.
    pub(crate) fn new(
        model: &'h Inner,
        options: &'h LoadOptions,
        device: &'h Arc<dyn Device>,
        probed: &Probed,
    ) -> Hope<'h> {
        let why = |file: usize| match (&model.source, &options.allocator, probed.residency.get(file)) {
            (Source::Memory { .. }, _, _) => Some("the files are bytes in memory"),
            (_, Some(_), _) => Some("the result is in memory of the caller's allocator"),
            (_, _, Some(Residency::Hot)) if options.direct_storage == Preference::Preferred => Some(IS_HOT),
            _ => None,
        };
        let ruled_out = (0..model.checkpoint.files().len()).map(why).collect();
        Hope { device, model, options, ruled_out }
    }

    fn route(&self) -> Option<Route> {
        route_for(self.device.id(), self.ruled_out.iter().map(Option::is_none).collect())
    }

    /// Tries what a plan reads by storage into the device.
    ///
    /// # Errors
    /// Those of a device that is lost; what else stands in the way is kept with the files it concerns.
    fn try_files(&self, plan: &Plan) -> Result<Storage> {
        let id = self.device.id();
        let ruled_out = |file: u32| Some((file, self.ruled_out[file as usize]?.to_owned()));
        let refused = files_for(plan, id, false).into_iter().filter_map(ruled_out).collect();
        let mut storage = Storage { device: id, library: None, files: Arc::new([]), refused };
        let files: Vec<u32> = files_for(plan, id, true).into_iter().collect();
        let Source::Files(opened) = &self.model.source else { return Ok(storage) };
        if files.is_empty() {
            return Ok(storage);
        }
        let first = super::open(self.device, self.options)
            .and_then(|library| Ok((Probe::new(&library, self.device)?, library)));
        let tried = match first {
            Ok((probe, library)) => {
                storage.library = Some(Arc::clone(&library));
                Trial { library: &library, device: self.device, opened, files: &files }.run(probe)
            }
            Err(Refusal::Device(error)) if error.is_lost() => return Err(error.into()),
            Err(refusal) => {
                let why = refusal.to_string();
                storage.refused.extend(files.into_iter().map(|file| (file, why.clone())));
                storage.refused.sort_unstable();
                return Ok(storage);
            }
        };
        let mut taken: Vec<Option<DirectFile>> = self.ruled_out.iter().map(|_| None).collect();
        for (file, verdict) in tried {
            match verdict {
                Ok(direct) => taken[file as usize] = Some(direct),
                Err(Refusal::Device(error)) if error.is_lost() => {
                    return Err(Error::from(error).in_file(self.model.file_path(file as usize)));
                }
                Err(refusal) => storage.refused.push((file, refusal.to_string())),
            }
        }
        storage.refused.sort_unstable();
        storage.files = taken.into();
        Ok(storage)
    }

    /// Tries nothing, for that reason.
    fn give_up(&self, why: &str) -> Storage {
        let refused = (0..self.ruled_out.len() as u32).map(|file| (file, why.to_owned())).collect();
        Storage { device: self.device.id(), library: None, files: Arc::new([]), refused }
    }
}

/// Plans as if storage could read every file that is not ruled out, tries those that the plan then reads so, each on its devices, and plans
/// anew where one is refused. So what is not read costs no trial, and in a machine that is set up well there is one plan.
///
/// Returns the seconds that trying took, too.
///
/// # Errors
/// Those of planning, and of a device that is lost.
pub(crate) fn plan(
    hopes: &[Hope<'_>],
    plan_with: impl Fn(Vec<Route>) -> Result<Plan>,
) -> Result<(Plan, Vec<Storage>, f64)> {
    let hoped = match plan_with(hopes.iter().filter_map(Hope::route).collect()) {
        Ok(plan) => plan,
        // Storage asks for more room: the load may fit without.
        Err(error) if hopes.iter().any(|hope| hope.options.direct_storage == Preference::Preferred) => {
            let why = error.one_line();
            let storages = hopes.iter().map(|hope| hope.give_up(&why)).collect();
            return Ok((plan_with(Vec::new())?, storages, 0.0));
        }
        Err(error) => return Err(error),
    };
    let (storages, seconds) = timed(|| try_all(hopes, &hoped));
    let storages = storages?;
    let is_refused = |(hope, storage): (&Hope<'_>, &Storage)| {
        storage.refused.iter().any(|(file, _)| hope.ruled_out[*file as usize].is_none())
    };
    if !hopes.iter().zip(&storages).any(is_refused) {
        return Ok((hoped, storages, seconds));
    }
    let routes = storages.iter().filter_map(Storage::route).collect();
    Ok((plan_with(routes)?, storages, seconds))
}

/// Tries files on all devices at once.
fn try_all(hopes: &[Hope<'_>], plan: &Plan) -> Result<Vec<Storage>> {
    if let [hope] = hopes {
        return Ok(vec![hope.try_files(plan)?]);
    }
    let tried: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = hopes.iter().map(|hope| scope.spawn(|| hope.try_files(plan))).collect();
        threads.into_iter().map(|thread| thread.join().expect("trying files does not panic")).collect()
    });
    tried.into_iter().collect()
}

/// Files to try on one device.
struct Trial<'t> {
    library: &'t Arc<Library>,
    device: &'t Arc<dyn Device>,
    opened: &'t Arc<[OpenFile]>,
    files: &'t [u32],
}

impl Trial<'_> {
    /// Tries every file, in no order; on several threads where there are many, each with memory of its own.
    ///
    /// A trial is by use, for each file and device: two files of one filesystem may lie on different disks or be laid out otherwise (inline,
    /// compressed, encrypted, reflinked), and a bridge may carry one disk's writes to one device and not to another. What it costs is some round trips
    /// to the device, and those of several threads overlap.
    fn run(&self, first: Probe) -> Vec<(u32, Result<DirectFile, Refusal>)> {
        let (next, tried) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(self.files.len())));
        let work = |probe: Probe| {
            while let Some(file) = self.files.get(next.fetch_add(1, Ordering::Relaxed)) {
                let verdict = probe.try_file(self.opened, *file);
                tried.lock().unwrap_or_else(PoisonError::into_inner).push((*file, verdict));
            }
        };
        let count = self.files.len().div_ceil(FILES_EACH).min(THREADS_MAX);
        thread::scope(|scope| {
            for _ in 1..count {
                // Memory or a thread that cannot be had leaves the files to the others.
                scope.spawn(|| Probe::new(self.library, self.device).map(&work));
            }
            work(first);
        });
        tried.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the files that a plan reads for a device: by storage, or at all.
fn files_for(plan: &Plan, device: DeviceId, by_storage: bool) -> BTreeSet<u32> {
    let is_own = |place: Place| plan.arenas()[place.arena as usize].device == device;
    let is_for_it = |read: &&tensorhaul_plan::Read| match read.target {
        Target::InPlace(place) if is_by_storage(plan, read) => is_own(place),
        _ => !by_storage && plan.copies(read).iter().any(|copy| is_own(copy.target)),
    };
    plan.reads().iter().filter(is_for_it).map(|read| read.extent.file).collect()
}

/// Copying what is there takes a fifth of the time that reading past it takes.
const IS_HOT: &str = "all in the page cache, which is faster";

/// A trial takes some tenths of a millisecond, memory for a thread's own trials (pinned, and of the device) about one.
const FILES_EACH: usize = 16;

const THREADS_MAX: usize = 4;
