//! The devices' side of a load: their contexts, the arenas, the pinned rings.

use std::sync::Arc;
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::Instant;

use tensorhaul_device::host::Host;
use tensorhaul_device::{Allocation, Device, DeviceError, Near, OperationKind, Stream};
use tensorhaul_plan::{Arena, DeviceId, Padding, PlacedTensor, Plan, Request};
use tensorhaul_stage::{Pinned, Ring};

use crate::assignment::Assignment;
use crate::cancel::Cancel;
use crate::devices::{self, Found};
use crate::error::{Error, ErrorKind, Result};
use crate::external::ExternalMemory;
use crate::mapping;
use crate::options::LoadOptions;
use crate::report::Phases;
use crate::storage;

/// What copies need, and reads into staging buffers do not.
pub(crate) struct Prepared {
    /// As in the load's [`Assignment`].
    pub(crate) devices: Vec<PreparedDevice>,
    /// As in its plan.
    pub(crate) arenas: Vec<Arc<dyn Allocation>>,
}

/// One device that is ready, with what of the load is on it.
pub(crate) struct PreparedDevice {
    /// Its number in the load's [`Assignment`].
    pub(crate) number: usize,
    pub(crate) device: Arc<dyn Device>,
    /// Its arenas, by their numbers in the plan.
    pub(crate) arenas: Vec<(u32, Arc<dyn Allocation>)>,
    /// `None` when the load has no ring for it, or when it refused to pin that.
    pub(crate) pinned: Option<Pinned>,
    /// What it cost: the context, the allocation and the pinning.
    pub(crate) phases: Phases,
}

impl Prepared {
    /// Joins all devices of a load.
    pub(crate) fn new(mut devices: Vec<PreparedDevice>) -> Prepared {
        devices.sort_unstable_by_key(|device| device.number);
        let mut arenas: Vec<_> = devices.iter().flat_map(|device| &device.arenas).collect();
        arenas.sort_unstable_by_key(|(arena, _)| *arena);
        let arenas = arenas.into_iter().map(|(_, memory)| Arc::clone(memory)).collect();
        Prepared { devices, arenas }
    }

    /// Returns how long preparing took, without what it waited for a processor.
    pub(crate) fn seconds(&self) -> f64 {
        let seconds = |device: &PreparedDevice| {
            let Phases { context_seconds, allocate_seconds, pin_seconds, .. } = device.phases;
            context_seconds + allocate_seconds.max(pin_seconds)
        };
        self.devices.iter().map(seconds).fold(0.0, f64::max)
    }

    /// Returns what it cost: devices are prepared beside each other, so each cost is that of the slowest.
    pub(crate) fn phases(&self) -> Phases {
        self.devices.iter().fold(Phases::default(), |all, PreparedDevice { phases, .. }| Phases {
            context_seconds: all.context_seconds.max(phases.context_seconds),
            allocate_seconds: all.allocate_seconds.max(phases.allocate_seconds),
            pin_seconds: all.pin_seconds.max(phases.pin_seconds),
            module_seconds: all.module_seconds.max(phases.module_seconds),
            ..all
        })
    }
}

/// When the devices of a load are prepared.
pub(crate) struct Preparing<'p> {
    /// Before its first read.
    pub(crate) done: Vec<PreparedDevice>,
    /// Beside its reads.
    pub(crate) beside: Option<Box<dyn FnOnce() -> Result<Vec<PreparedDevice>> + 'p>>,
}

/// A device of a load before it is ready.
pub(crate) struct Side<'scope> {
    pub(crate) id: DeviceId,
    pub(crate) near: Near,
    /// Whether storage can write into its memory.
    pub(crate) is_able: bool,
    /// Its memory in all, where that is all that is known.
    total_bytes: Option<u64>,
    opening: Opening<'scope>,
}

enum Opening<'scope> {
    Found(Found),
    /// On a thread of its own.
    UnderWay(ScopedJoinHandle<'scope, (Result<Arc<dyn Device>>, f64)>),
    /// With the seconds it took, where this load opened it.
    Done(Arc<dyn Device>, f64),
}

impl<'scope> Side<'scope> {
    pub(crate) fn new(id: DeviceId, found: Found, is_able: bool) -> Side<'scope> {
        Side {
            id,
            near: found.near(),
            is_able,
            total_bytes: found.total_bytes(),
            opening: match found.opened() {
                Some(device) => Opening::Done(Arc::clone(device), 0.0),
                None => Opening::Found(found),
            },
        }
    }

    /// Begins to open the device, unless that has begun.
    pub(crate) fn open(self, scope: &'scope Scope<'scope, '_>) -> Side<'scope> {
        let opening = match self.opening {
            Opening::Found(found) => Opening::UnderWay(scope.spawn(|| timed(|| found.open()))),
            opening => opening,
        };
        Side { opening, ..self }
    }

    /// Waits until it is open.
    pub(crate) fn opened(self) -> Result<Side<'scope>> {
        let (device, seconds) = self.opening.wait()?;
        Ok(Side { opening: Opening::Done(device, seconds), ..self })
    }

    /// Returns the device if it is open.
    pub(crate) fn device(&self) -> Option<&Arc<dyn Device>> {
        match &self.opening {
            Opening::Done(device, _) => Some(device),
            _ => None,
        }
    }

    /// Refuses a plan that promises more than the device has: in all, which is known before there is a context, or free, if it is open
    /// and can be asked.
    pub(crate) fn check_memory(&self, plan: &Plan, options: &LoadOptions) -> Result<()> {
        if let Some(total_bytes) = self.total_bytes {
            check_total(plan, options, self.id, total_bytes)?;
        }
        self.device().map_or(Ok(()), |device| check_free(plan, options, &**device))
    }
}

impl Opening<'_> {
    fn wait(self) -> Result<(Arc<dyn Device>, f64)> {
        let (device, seconds) = match self {
            Opening::Found(found) => timed(|| found.open()),
            Opening::UnderWay(thread) => thread.join().expect("opening a device does not panic"),
            Opening::Done(device, seconds) => (Ok(device), seconds),
        };
        Ok((device?, seconds))
    }
}

/// What preparing a device takes.
#[derive(Clone, Copy)]
pub(crate) struct Preparation<'p> {
    pub(crate) plan: &'p Plan,
    pub(crate) assignment: &'p Assignment,
    pub(crate) options: &'p LoadOptions,
    pub(crate) cancel: &'p Cancel,
}

impl Preparation<'_> {
    /// Waits for devices, given with their numbers and rings, and makes them ready, beside each other. All are waited for, whatever fails;
    /// each that failed is forgotten.
    pub(crate) fn prepare(self, sides: Vec<(usize, Side<'_>, Option<Ring>)>) -> Result<Vec<PreparedDevice>> {
        let prepare = |(number, side, ring): (usize, Side<'_>, Option<Ring>)| {
            self.prepare_one(number, side, ring.as_ref()).inspect_err(devices::forget_failed)
        };
        if sides.len() < 2 {
            return sides.into_iter().map(prepare).collect();
        }
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = sides.into_iter().map(|side| scope.spawn(move || prepare(side))).collect();
            let join =
                |thread: ScopedJoinHandle<'_, _>| thread.join().expect("preparing a device does not panic");
            threads.into_iter().map(join).collect()
        });
        results.into_iter().collect()
    }

    /// Waits for a device, then allocates its arenas and pins its ring, one beside the other.
    ///
    /// A call of the driver cannot be interrupted: a load that was cancelled meanwhile ends here once the context is there.
    fn prepare_one(self, number: usize, side: Side<'_>, ring: Option<&Ring>) -> Result<PreparedDevice> {
        let Preparation { plan, assignment, options, cancel } = self;
        let mut phases = Phases::default();
        let was_asked = side.device().is_some();
        let (device, context_seconds) = side.opening.wait()?;
        phases.context_seconds = context_seconds;
        if !was_asked {
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
        if assignment.operations().contains(&number) {
            phases.module_seconds = device.prepare(OperationKind::Dequantize)?.as_secs_f64();
        }
        Ok(PreparedDevice { number, device, arenas, pinned, phases })
    }
}

/// Returns what `act` does and the seconds it takes.
pub(crate) fn timed<T>(act: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    (act(), start.elapsed().as_secs_f64())
}

/// Checks that the caller's own memory is of a device that the tensor goes to, and as long as what goes into it, before the first read.
pub(crate) fn check_external(plan: &Plan, request: &Request, options: &LoadOptions) -> Result<()> {
    // Also where the tensor is not loaded and nothing would be written: it is a mistake all the same.
    let all = mapping::devices(request);
    for (name, memory) in &options.targets {
        let wanted = match &request.device_map {
            Some(map) => map.devices_of(name).unwrap_or_default(),
            None => &all,
        };
        if !wanted.contains(&memory.place()) {
            let wanted = wanted.iter().map(DeviceId::to_string).collect::<Vec<_>>().join(" and ");
            let what = format!("the memory given is of {}, the load is for {wanted}", memory.place());
            return Err(Error::bad_request(what).about_tensor(name));
        }
    }
    check_layouts(plan, request, options)?;
    for arena in plan.arenas().iter().filter(|arena| arena.is_external) {
        let memory = external(arena, options);
        let given = memory.as_ref().map(|memory| memory.len_bytes());
        let is_view = memory.is_some_and(|memory| memory.held().is_some());
        let is_long_enough = is_view && given.is_some_and(|given| given >= arena.len_bytes);
        if given != Some(arena.len_bytes) && !is_long_enough {
            let what = match given {
                Some(given) => format!("the memory given has {given} bytes, the tensor {}", arena.len_bytes),
                None if all.len() > 1 => {
                    format!("no memory of {} is given for it", arena.device)
                }
                None => "no memory is given for it".to_owned(),
            };
            return Err(Error::bad_request(what).about_tensor(&arena.group));
        }
    }
    Ok(())
}

/// Checks that the caller's own memory is of the dtype and shape that the caller said.
fn check_layouts(plan: &Plan, request: &Request, options: &LoadOptions) -> Result<()> {
    if options.targets.iter().all(|(_, memory)| memory.held().is_none()) {
        return Ok(());
    }
    let is_external = |tensor: &&PlacedTensor| plan.arenas()[tensor.place.arena as usize].is_external;
    for tensor in plan.tensors().iter().filter(is_external) {
        let (name, device) = (plan.name(tensor), plan.device(tensor));
        let is_for_it =
            |(other, memory): &&(String, ExternalMemory)| other == name && memory.place() == device;
        let Some((_, memory)) = options.targets.iter().find(is_for_it) else { continue };
        let Some(held) = memory.held() else { continue };
        if (held.dtype, &*held.shape) != (tensor.dtype, plan.shape(tensor)) {
            let mut what = format!(
                "the memory given is for {} {:?}, the tensor is {} {:?}",
                held.dtype,
                held.shape,
                tensor.dtype,
                plan.shape(tensor)
            );
            if let Some(rows) = padding_rows(request, name) {
                what += &format!(
                    "; its {rows} rows of padding are in no file and are not written: give the shape without them, and memory as long as it is"
                );
            }
            return Err(Error::bad_request(what).about_tensor(name));
        }
        if options.checksums && memory.strides().is_some() {
            let what =
                "the memory given has gaps, and checksums are of bytes without; ask for one or the other";
            return Err(Error::bad_request(what).about_tensor(name));
        }
    }
    Ok(())
}

/// Returns the rows that a tensor has behind its end where it is used.
fn padding_rows(request: &Request, name: &str) -> Option<u64> {
    let assembly = request.assembly.as_ref()?;
    let is_its = |padding: &&Padding| assembly.tensors[padding.tensor as usize].name == name;
    assembly.padding.iter().find(is_its).map(|padding| padding.rows)
}

/// Refuses a plan that promises more than a device has in all, which is known before there is a context.
fn check_total(plan: &Plan, options: &LoadOptions, device: DeviceId, total_bytes: u64) -> Result<()> {
    let needed_bytes = device_bytes(plan, device);
    let is_hosts = plan.machine().in_place.is_hosts(device);
    if options.allocator.is_some() || needed_bytes <= total_bytes || is_hosts {
        return Ok(());
    }
    Err(DeviceError::TooSmall { device, needed_bytes, total_bytes }.into())
}

/// Refuses a plan that promises more than the device has free, before anything is allocated.
fn check_free(plan: &Plan, options: &LoadOptions, device: &dyn Device) -> Result<()> {
    if options.allocator.is_some() || device.id() == DeviceId::Host {
        return Ok(()); // Another allocator has memory of its own; the host's system decides at the first touch.
    }
    if plan.machine().in_place.is_hosts(device.id()) {
        return check_shared(plan, device.id());
    }
    let needed_bytes = device_bytes(plan, device.id());
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

/// Refuses a plan that promises more than the host has, for a device that shares its memory: the driver takes all of it at once, and
/// may count what the page cache holds as used, or know of its own part alone.
fn check_shared(plan: &Plan, device: DeviceId) -> Result<()> {
    let (needed_bytes, free_bytes) = (plan.promised().peak_host_bytes, Host.memory()?.free_bytes);
    if needed_bytes <= free_bytes {
        return Ok(());
    }
    Err(DeviceError::OutOfMemory { device, needed_bytes, free_bytes: Some(free_bytes) }.into())
}

/// Returns what a plan promises to take of a device: results and scratch, without the caller's own memory.
fn device_bytes(plan: &Plan, device: DeviceId) -> u64 {
    let own = plan.arenas().iter().filter(|arena| arena.device == device && !arena.is_external);
    own.map(|arena| arena.len_bytes).sum()
}

fn external(arena: &Arena, options: &LoadOptions) -> Option<Arc<ExternalMemory>> {
    let is_for_it =
        |(name, memory): &&(String, ExternalMemory)| *name == arena.group && memory.place() == arena.device;
    let (_, memory) = options.targets.iter().find(is_for_it)?;
    Some(Arc::new(memory.clone()))
}

/// Allocates a device's arenas, behind whatever the caller's stream still does with their memory.
fn allocate(
    plan: &Plan,
    options: &LoadOptions,
    device: &dyn Device,
) -> Result<Vec<(u32, Arc<dyn Allocation>)>> {
    let allocate = |arena: &Arena, is_by_storage: bool| -> Result<Arc<dyn Allocation>> {
        if let Some(memory) = external(arena, options).filter(|_| arena.is_external) {
            return Ok(memory);
        }
        let Some(allocator) = &options.allocator else {
            return Ok(match plan.machine().in_place.is_hosts(arena.device) {
                true => device.allocate_in_place(arena.len_bytes)?,
                false if is_by_storage => device.allocate_for_storage(arena.len_bytes)?,
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
    let id = device.id();
    let own = (0..).zip(plan.arenas()).zip(storage::arenas_in_place(plan));
    let own = own.filter(|((_, arena), _)| arena.device == id);
    let allocate = |((number, arena), is_by_storage)| Ok((number, allocate(arena, is_by_storage)?));
    let arenas = own.map(allocate).collect::<Result<Vec<_>>>()?;
    if let Some(stream) = options.stream_of(id) {
        device.follow(stream)?;
        arenas.iter().for_each(|(_, arena)| arena.release_after(stream));
    }
    Ok(arenas)
}
