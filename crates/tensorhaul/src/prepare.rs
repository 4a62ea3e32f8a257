//! The device's side of a load: its context, the arenas, the pinned ring.

use std::sync::Arc;
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::Instant;

use tensorhaul_device::{Allocation, Device, DeviceError, OperationKind, Stream};
use tensorhaul_plan::{Arena, DeviceId, Plan};
use tensorhaul_stage::{Pinned, Ring};

use crate::cancel::Cancel;
use crate::devices::{self, Found};
use crate::error::{Error, ErrorKind, Result};
use crate::options::LoadOptions;
use crate::report::Phases;
use crate::storage;

/// What copies need, and reads into staging buffers do not.
pub(crate) struct Prepared {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) arenas: Vec<Arc<dyn Allocation>>,
    /// `None` when the load has no ring, or when the device refused to pin it.
    pub(crate) pinned: Option<Pinned>,
    /// What it cost: the context, the allocation and the pinning.
    pub(crate) phases: Phases,
}

impl Prepared {
    /// Returns how long preparing took, without what it waited for a processor.
    pub(crate) fn seconds(&self) -> f64 {
        let Phases { context_seconds, allocate_seconds, pin_seconds, .. } = self.phases;
        context_seconds + allocate_seconds.max(pin_seconds)
    }
}

/// When a load is prepared.
pub(crate) enum Preparing<'p> {
    /// Before its first read.
    Done(Prepared),
    /// Beside its reads.
    Beside(Box<dyn FnOnce() -> Result<Prepared> + 'p>),
}

/// A device that is open, or being opened on a thread of its own.
pub(crate) enum Opening<'scope> {
    /// With the seconds that making its context took; 0 when an earlier load did.
    Done(Arc<dyn Device>, f64),
    UnderWay(ScopedJoinHandle<'scope, (Result<Arc<dyn Device>>, f64)>),
}

impl<'scope> Opening<'scope> {
    pub(crate) fn start(found: Found, scope: &'scope Scope<'scope, '_>) -> Opening<'scope> {
        if let Some(device) = found.opened() {
            return Opening::Done(Arc::clone(device), 0.0);
        }
        Opening::UnderWay(scope.spawn(|| timed(|| found.open())))
    }

    /// Waits for the device.
    pub(crate) fn wait(self) -> Result<(Arc<dyn Device>, f64)> {
        match self {
            Opening::Done(device, seconds) => Ok((device, seconds)),
            Opening::UnderWay(thread) => {
                let (device, seconds) = thread.join().expect("opening a device does not panic");
                Ok((device?, seconds))
            }
        }
    }

    /// Refuses a plan that promises more than the device has free, if it is open and can be asked.
    pub(crate) fn check_memory(&self, plan: &Plan, options: &LoadOptions) -> Result<()> {
        match self {
            Opening::Done(device, _) => check_free(plan, options, &**device),
            Opening::UnderWay(_) => Ok(()),
        }
    }
}

/// Waits for the device, then allocates the arenas and pins the ring, one beside the other.
///
/// A call of the driver cannot be interrupted: a load that was cancelled meanwhile ends here once the context is there.
pub(crate) fn prepare(
    plan: &Plan,
    options: &LoadOptions,
    cancel: &Cancel,
    ring: Option<&Ring>,
    opening: Opening<'_>,
) -> Result<Prepared> {
    let mut phases = Phases::default();
    let was_under_way = matches!(opening, Opening::UnderWay(_));
    let device;
    (device, phases.context_seconds) = opening.wait()?;
    if was_under_way {
        check_free(plan, options, &*device)?;
    }
    if cancel.is_cancelled() {
        return Err(Error::cancelled());
    }
    let pin = || timed(|| ring.map_or(Ok(None), |ring| devices::pin(&*device, ring)));
    let allocate = || timed(|| allocate(plan, options, &*device));
    let is_pinned = ring.is_none_or(|ring| ring.pinned().is_some());
    let (pinned, arenas) = if is_pinned {
        (pin(), allocate())
    } else {
        thread::scope(|scope| {
            let pinning = scope.spawn(pin);
            let arenas = allocate();
            (pinning.join().expect("pinning does not panic"), arenas)
        })
    };
    (phases.allocate_seconds, phases.pin_seconds) = (arenas.1, pinned.1);
    let (arenas, pinned) = (arenas.0?, pinned.0?);
    if !plan.operations().is_empty() {
        phases.module_seconds = device.prepare(OperationKind::Dequantize)?.as_secs_f64();
    }
    Ok(Prepared { device, arenas, pinned, phases })
}

/// Returns what `act` does and the seconds it takes.
pub(crate) fn timed<T>(act: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    (act(), start.elapsed().as_secs_f64())
}

/// Checks that the caller's own memory is of the load's device and as long as what goes into it, before the first read.
pub(crate) fn check_external(plan: &Plan, options: &LoadOptions) -> Result<()> {
    for arena in plan.arenas().iter().filter(|arena| arena.is_external) {
        let given = external(arena, options).map(|memory| memory.len_bytes());
        if given != Some(arena.len_bytes) {
            let what = match given {
                Some(given) => format!("the memory given has {given} bytes, the tensor {}", arena.len_bytes),
                None => "no memory is given for it".to_owned(),
            };
            return Err(Error::bad_request(what).about_tensor(&arena.group));
        }
    }
    // Also where the tensor is not loaded and nothing would be written: it is a mistake all the same.
    let wanted = options.request.device;
    match options.targets.iter().find(|(_, memory)| memory.place() != wanted) {
        Some((name, memory)) => {
            let what = format!("the memory given is of {}, the load is for {wanted}", memory.place());
            Err(Error::bad_request(what).about_tensor(name))
        }
        None => Ok(()),
    }
}

/// Refuses a plan that promises more than the device has in all, which is known before there is a context.
pub(crate) fn check_total(plan: &Plan, options: &LoadOptions, total_bytes: u64) -> Result<()> {
    let (device, needed_bytes) = (options.request.device, device_bytes(plan));
    if options.allocator.is_some() || needed_bytes <= total_bytes {
        return Ok(());
    }
    Err(DeviceError::TooSmall { device, needed_bytes, total_bytes }.into())
}

/// Refuses a plan that promises more than the device has free, before anything is allocated.
fn check_free(plan: &Plan, options: &LoadOptions, device: &dyn Device) -> Result<()> {
    if options.allocator.is_some() || device.id() == DeviceId::Host {
        return Ok(()); // Another allocator has memory of its own; the host's system decides at the first touch.
    }
    let needed_bytes = device_bytes(plan);
    if needed_bytes <= device.memory()?.free_bytes {
        return Ok(());
    }
    // What was freed in the order of a stream stays with the driver's pool until somebody waits for that stream.
    device.wait(&device.record(Stream::Copy)?)?;
    let free_bytes = device.memory()?.free_bytes;
    if needed_bytes <= free_bytes {
        return Ok(());
    }
    Err(DeviceError::OutOfMemory { device: device.id(), needed_bytes, free_bytes: Some(free_bytes) }.into())
}

fn device_bytes(plan: &Plan) -> u64 {
    plan.promised().target_bytes + plan.promised().transient_bytes
}

fn external(arena: &Arena, options: &LoadOptions) -> Option<Arc<dyn Allocation>> {
    let (_, memory) = options.targets.iter().find(|(name, _)| *name == arena.group)?;
    Some(Arc::new(memory.clone()))
}

/// Allocates the arenas, behind whatever the caller's stream still does with their memory.
fn allocate(plan: &Plan, options: &LoadOptions, device: &dyn Device) -> Result<Vec<Arc<dyn Allocation>>> {
    let allocate = |(arena, is_by_storage): (&Arena, bool)| -> Result<Arc<dyn Allocation>> {
        if let Some(memory) = external(arena, options).filter(|_| arena.is_external) {
            return Ok(memory);
        }
        let Some(allocator) = &options.allocator else {
            return Ok(match is_by_storage {
                true => device.allocate_for_storage(arena.len_bytes)?,
                false => device.allocate(arena.len_bytes)?,
            });
        };
        let refused = |error| Error::new(ErrorKind::OutOfMemory, error);
        let memory = allocator.allocate(arena.device, arena.len_bytes).map_err(refused)?;
        if memory.len_bytes() < arena.len_bytes {
            let what =
                format!("the allocator gave {} bytes instead of {}", memory.len_bytes(), arena.len_bytes);
            return Err(Error::bad_request(what));
        }
        Ok(memory)
    };
    let arenas =
        plan.arenas().iter().zip(storage::arenas_in_place(plan)).map(allocate).collect::<Result<Vec<_>>>()?;
    if let Some(stream) = options.stream {
        device.follow(stream)?;
        arenas.iter().for_each(|arena| arena.release_after(stream));
    }
    Ok(arenas)
}
