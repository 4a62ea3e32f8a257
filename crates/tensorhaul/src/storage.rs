//! Direct storage in a load: which files storage reads straight into the device, and why not the others.

mod trial;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tensorhaul_device::{Allocation, Device, STORAGE_ALIGN_BYTES};
use tensorhaul_direct::{Direct, DirectFile, DirectMode, Library};
use tensorhaul_plan::{Brought, DeviceId, InPlace, Place, Plan, Read, Route, plan::Target};

pub(crate) use trial::{Hope, plan};

use crate::error::{Error, Result};
use crate::model::Inner;
use crate::options::LoadOptions;
use crate::prepare::PreparedDevice;
use crate::report::Fallback;

/// Opening a library may take seconds, so it is kept as devices are.
static KEPT: Mutex<Vec<Arc<Library>>> = Mutex::new(Vec::new());

/// What storage can read into one load's device, found out by [`trial::plan`].
pub(crate) struct Storage {
    device: DeviceId,
    library: Option<Arc<Library>>,
    files: Arc<[Option<DirectFile>]>,
    /// Files that are read otherwise, and why, ascending.
    refused: Vec<(u32, String)>,
}

impl Storage {
    /// Returns the device.
    pub(crate) fn device(&self) -> DeviceId {
        self.device
    }

    /// Returns the way into the device's memory for a plan, if any file has one.
    fn route(&self) -> Option<Route> {
        route_for(self.device, self.files.iter().map(Option::is_some).collect())
    }

    /// Refuses a plan that reads a file otherwise, with the reason for each. What is staged anyway, because it is short, does not count.
    pub(crate) fn check_required(&self, plan: &Plan, model: &Inner) -> Result<()> {
        let staged = self.staged(plan, false);
        let is_long = |file: &u32| staged.get(file).is_some_and(|len_bytes| *len_bytes >= LONG_LEN_BYTES);
        let refused: Vec<_> = self.refused.iter().filter(|(file, _)| is_long(file)).collect();
        let told = refused.iter().take(TOLD_MAX).map(|(file, why)| {
            let path = model.file_path(*file as usize);
            format!("{}: {why}", path.file_name().unwrap_or(path.as_os_str()).display())
        });
        let mut told = told.collect::<Vec<_>>().join("; ");
        match refused.len() {
            0 => return Ok(()),
            count if count > TOLD_MAX => told += &format!("; and {} files more", count - TOLD_MAX),
            _ => {}
        }
        let what = format!("direct storage is required, and cannot read {told}; without it the load works");
        let error = Error::bad_request(what);
        Err(match refused.as_slice() {
            [(file, _)] => error.about_file(model.file_path(*file as usize)),
            _ => error,
        })
    }

    /// Sums by file what goes to the device through the ring; of `only_long`, what belongs to tensors that direct storage is for.
    fn staged(&self, plan: &Plan, only_long: bool) -> BTreeMap<u32, u64> {
        let is_own = |place: Place| plan.arenas()[place.arena as usize].device == self.device;
        let is_long = |brought: &Brought| match *brought {
            Brought::Tensor(tensor) => {
                let tensor = &plan.tensors()[tensor as usize];
                tensor.len_bytes >= LONG_LEN_BYTES && is_own(tensor.place)
            }
            Brought::Operation(operation) => {
                let sources = &plan.operations()[operation as usize].sources;
                sources.iter().any(|source| source.len_bytes >= LONG_LEN_BYTES && is_own(source.place))
            }
        };
        let mut staged = BTreeMap::new();
        for read in plan.reads() {
            let own = plan.copies(read).iter().filter(|copy| is_own(copy.target));
            let len_bytes: u64 = own.map(|copy| copy.len_bytes * copy.steps.count).sum();
            if len_bytes > 0 && (!only_long || plan.brought(read).iter().any(is_long)) {
                *staged.entry(read.extent.file).or_default() += len_bytes;
            }
        }
        staged
    }

    /// Tells of bytes in files that storage can read, but that are staged: parts of rows, and what several devices take.
    pub(crate) fn staged_fallback(&self, plan: &Plan) -> Option<Fallback> {
        let is_taken = |file: &u32| self.files.get(*file as usize).is_some_and(Option::is_some);
        let staged = self.staged(plan, true);
        let staged: u64 =
            staged.iter().filter(|(file, _)| is_taken(file)).map(|(_, len_bytes)| len_bytes).sum();
        let what = format!("{staged} bytes for {} are read through the staging ring", self.device);
        let why = "direct storage reads whole, aligned tensors for one device";
        (staged > 0).then(|| Fallback::new(what, why))
    }

    /// Returns what is read otherwise, and why, one line for each reason.
    pub(crate) fn fallbacks(&self) -> Vec<Fallback> {
        let mut reasons: Vec<(&str, u64)> = Vec::new();
        for (_, why) in &self.refused {
            match reasons.iter_mut().find(|(reason, _)| reason == why) {
                Some((_, files)) => *files += 1,
                None => reasons.push((why, 1)),
            }
        }
        let told = reasons.into_iter().map(|(why, files)| {
            let files = if files == 1 { "1 file is".to_owned() } else { format!("{files} files are") };
            let what = format!(
                "{files} read through the staging ring instead of by direct storage into {}",
                self.device
            );
            Fallback::new(what, why)
        });
        told.collect()
    }

    /// Makes the engine that reads into the arenas of a plan; `None` when nothing is planned for it.
    pub(crate) fn engine(
        &self,
        plan: &Plan,
        prepared: &PreparedDevice,
        options: &LoadOptions,
        fallbacks: &mut Vec<Fallback>,
    ) -> Option<Direct> {
        let library = self.library.as_ref()?;
        let arenas = arenas_in_place(plan);
        let is_read_into = |(number, _): &&(u32, Arc<dyn Allocation>)| arenas[*number as usize];
        let allocations = prepared.arenas.iter().filter(is_read_into);
        let allocations: Vec<Arc<dyn Allocation>> = allocations.map(|(_, arena)| Arc::clone(arena)).collect();
        if allocations.is_empty() {
            return None;
        }
        let (count, files) = (allocations.len(), Arc::clone(&self.files));
        let (direct, unregistered) =
            Direct::new(&prepared.device, library, files, allocations, options.direct_mode);
        if let Some(unregistered) = unregistered {
            let what = format!(
                "direct storage reads into {} of {count} arenas of {} through memory of its own",
                unregistered.count, self.device
            );
            fallbacks.push(Fallback::new(what, unregistered.error));
        }
        if let (mode, Some(why)) = direct.mode() {
            let what = match mode {
                DirectMode::Batch { entries } => {
                    format!("direct storage reads in batches of {entries}, fewer than asked for")
                }
                _ => "direct storage reads on threads instead of in batches".to_owned(),
            };
            fallbacks.push(Fallback::new(what, why));
        }
        Some(direct)
    }
}

/// Refuses to require direct storage where no device has memory that it reads into: of the devices, and whether reads land in their memory anyway.
pub(crate) fn check_has_use(mut devices: impl Iterator<Item = (DeviceId, bool)> + Clone) -> Result<()> {
    if devices.clone().any(|(_, is_able)| !is_able) {
        return Ok(());
    }
    let Some((device, _)) = devices.find(|(device, _)| *device != DeviceId::Host) else { return Ok(()) };
    Err(Error::bad_request(format!(
        "direct storage is required, and reads into devices with memory of their own; the memory of {device} is the host's, where reads \
         land in place without it"
    )))
}

/// The way into a device's memory for every file; what a load is planned with that requires direct storage.
pub(crate) fn route_for_all(device: DeviceId) -> Route {
    Route { device, files: None, is_hosts: false, read_len_bytes_max: READ_LEN_BYTES_MAX }
}

/// The way into a device's memory for these files; `None` where there are none.
fn route_for(device: DeviceId, files: Vec<bool>) -> Option<Route> {
    files.contains(&true).then(|| Route { files: Some(files), ..route_for_all(device) })
}

/// Adds routes to what a plan may read in place; returns the alignment that direct reads then need.
pub(crate) fn add_routes(in_place: &mut InPlace, routes: Vec<Route>, align_bytes: u64) -> u64 {
    let align_bytes = if routes.is_empty() { align_bytes } else { align_bytes.max(STORAGE_ALIGN_BYTES) };
    in_place.routes.extend(routes);
    align_bytes
}

/// Tells whether storage reads it straight into a device: of those reads that land in place, the ones into memory that is not the host's.
pub(crate) fn is_by_storage(plan: &Plan, read: &Read) -> bool {
    let Target::InPlace(Place { arena, .. }) = read.target else { return false };
    let route = plan.machine().in_place.route(plan.arenas()[arena as usize].device, read.extent.file);
    route.is_some_and(|route| !route.is_hosts)
}

/// Tells of each arena whether storage reads into it.
pub(crate) fn arenas_in_place(plan: &Plan) -> Vec<bool> {
    let mut arenas = vec![false; plan.arenas().len()];
    for read in plan.reads().iter().filter(|read| is_by_storage(plan, read)) {
        if let Target::InPlace(place) = read.target {
            arenas[place.arena as usize] = true;
        }
    }
    arenas
}

/// Opens the library of the device's vendor, and keeps it open.
fn open(
    device: &Arc<dyn Device>,
    options: &LoadOptions,
) -> std::result::Result<Arc<Library>, tensorhaul_direct::Refusal> {
    let library = Library::open(device, options.direct_compatibility)?;
    let mut kept = lock();
    if !kept.iter().any(|kept| Arc::ptr_eq(kept, &library)) {
        kept.push(Arc::clone(&library));
    }
    Ok(library)
}

/// Lets go of the libraries that loads have kept open.
pub(crate) fn release() {
    let kept = std::mem::take(&mut *lock());
    drop(kept); // Without the lock: closing may take its time.
}

/// Lets go of the libraries that were opened inside a device, which is lost, and would be kept by them.
pub(crate) fn release_opened_inside(device: DeviceId) {
    let is_inside = |library: &mut Arc<Library>| library.device().id() == device;
    let inside: Vec<_> = lock().extract_if(.., is_inside).collect();
    drop(inside);
}

/// A panic elsewhere leaves a list that is whole.
fn lock() -> MutexGuard<'static, Vec<Arc<Library>>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the libraries themselves read at once; 8 in flight are 128 MiB, as deep as `io_uring` goes.
const READ_LEN_BYTES_MAX: u64 = 16 << 20;

/// The planner stages shorter runs, so that neighbours share a request.
const LONG_LEN_BYTES: u64 = 64 << 10;

/// So many files are told of by name.
const TOLD_MAX: usize = 4;
