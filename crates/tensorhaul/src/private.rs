//! The private hand-over: tensors in memory of their own, read by engines.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use tensorhaul_device::{Allocation, Device, DeviceError};
use tensorhaul_plan::plan::{Machine, Target};
use tensorhaul_plan::{Arena, DeviceId, Plan, Request};
use tensorhaul_stage::Ring;

use crate::cancel::Cancel;
use crate::devices;
use crate::error::{Error, ErrorKind, Result};
use crate::handover::{Emit, staging_layout};
use crate::lanes::lanes;
use crate::model::Inner;
use crate::options::{LoadOptions, Preference};
use crate::pipeline::{Lane, Transfer, Transferred};
use crate::probed::{Probed, Temperatures};
use crate::report::{Fallback, Phases, Report};

/// Plans a private load and does nothing else.
pub(crate) fn plan(model: &Inner, options: &LoadOptions) -> Result<Plan> {
    let probed = Probed::new(model, options);
    // An accelerator is not opened to make a plan: storage cannot write into its memory.
    let machine = machine(options, options.request.device == DeviceId::Host, &probed)?;
    Ok(Plan::new(&model.checkpoint, &request(options), &machine)?)
}

/// Loads; forgets a device that failed, so that the next load opens it anew.
pub(crate) fn run(
    model: &Inner,
    options: &LoadOptions,
    cancel: &Cancel,
    emit: &mut Emit<'_>,
) -> Result<Report> {
    let result = attempt(model, options, cancel, emit);
    if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Device) {
        devices::forget(options.request.device);
    }
    result
}

/// Probes, plans, allocates, and reads.
///
/// Opening a device and pinning its ring take longest and wait for nobody, so each runs beside what
/// does not need it; the report shows them apart.
fn attempt(model: &Inner, options: &LoadOptions, cancel: &Cancel, emit: &mut Emit<'_>) -> Result<Report> {
    let start = Instant::now();
    let (mut probed, opened) = thread::scope(|scope| {
        let opening = scope.spawn(|| devices::open(options.request.device));
        let probed = Probed::new(model, options);
        (probed, opening.join().expect("opening a device does not panic"))
    });
    let (device, device_seconds) = opened?;
    let machine = machine(options, device.capabilities().in_place, &probed)?;
    let probed_at = Instant::now();

    let plan = Plan::new(&model.checkpoint, &request(options), &machine)?;
    check_external(&plan, options)?;
    check_memory(&plan, options, &*device)?;
    let planned_at = Instant::now();

    let mut fallbacks = std::mem::take(&mut probed.fallbacks);
    let (ring, temperatures, arenas) = thread::scope(|scope| {
        let pinning = scope.spawn(|| ring(&plan, options, &*device));
        let temperatures = Temperatures::new(model, &plan, &probed);
        let arenas = allocate(&plan, options, &*device);
        (pinning.join().expect("pinning does not panic"), temperatures, arenas)
    });
    let (arenas, (ring, pin_seconds)) = (arenas?, ring?);
    let is_own =
        |(arena, memory): &(&Arena, &Arc<dyn Allocation>)| !arena.is_external && memory.host_ptr().is_some();
    let on_host: u64 =
        plan.arenas().iter().zip(&arenas).filter(is_own).map(|(_, memory)| memory.len_bytes()).sum();
    if let Some(ring) = &ring {
        cancel.closes(ring);
    }
    let lanes = lanes(model, options, &temperatures, ring.as_ref(), &*device, &mut fallbacks)?;
    let prepared_at = Instant::now();

    let transfer =
        Transfer { model, plan: &plan, device: &*device, arenas, ring: ring.clone(), options, cancel };
    let done = transfer.run(&lanes, &temperatures.access, emit)?;
    model.check_unchanged(plan.reads().iter().map(|read| read.extent.file))?;

    let engine = engine_name(&lanes);
    drop((transfer, lanes)); // Whoever still holds the ring lets go of it.
    fallbacks.extend(late_fallbacks(&done, &*device));
    let first_byte_at = done.first_byte.unwrap_or(prepared_at);
    let promised = *plan.promised();
    let report = Report {
        bytes: promised.payload_bytes,
        tensors: plan.tensors().len() as u64,
        device: options.request.device.to_string(),
        engine,
        handover: "private",
        resident: true,
        bytes_hot: temperatures.hot_bytes,
        bytes_cold: promised.payload_bytes - temperatures.hot_bytes,
        bytes_direct: temperatures.direct_bytes,
        bytes_in_place: promised.in_place_bytes,
        peak_staging_bytes: ring.as_ref().map_or(0, Ring::peak_bytes),
        peak_host_bytes: on_host + ring.as_ref().map_or(0, Ring::peak_bytes),
        promised,
        reads: promised.reads,
        requests: done.counts.requests,
        system_calls: done.counts.system_calls,
        phases: Phases {
            probe_seconds: (probed_at - start).as_secs_f64(),
            plan_seconds: (planned_at - probed_at).as_secs_f64(),
            prepare_seconds: (prepared_at - planned_at).as_secs_f64(),
            first_byte_seconds: (first_byte_at - prepared_at).as_secs_f64(),
            read_seconds: done.finished.saturating_duration_since(first_byte_at).as_secs_f64(),
            device_seconds,
            pin_seconds,
        },
        fallbacks,
        checksums: done.checksums,
        ..Report::of((done.finished - start).as_secs_f64(), promised.payload_bytes)
    };
    if let Some(ring) = ring {
        devices::keep(&*device, ring, cancel);
    }
    Ok(report)
}

/// Completes the request with what the options say.
fn request(options: &LoadOptions) -> Request {
    let mut request = options.request.clone();
    request.external.extend(options.targets.iter().map(|(name, _)| name.clone()));
    request
}

fn machine(options: &LoadOptions, able: bool, probed: &Probed) -> Result<Machine> {
    let layout = staging_layout(options)?;
    let in_place = match options.in_place {
        Preference::Off => false,
        Preference::Preferred => able,
        Preference::Required if able => true,
        Preference::Required => {
            return Err(Error::bad_request(format!(
                "{}: storage cannot write into its memory",
                options.request.device
            )));
        }
    };
    Ok(Machine {
        buffer_len_bytes: layout.buffer_len_bytes() as u64,
        buffer_count: layout.buffer_count(),
        direct_align_bytes: probed.direct_align_bytes,
        in_place,
    })
}

/// Checks that the caller's own memory is of the load's device and as long as what goes into it, before the first read.
fn check_external(plan: &Plan, options: &LoadOptions) -> Result<()> {
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

/// Refuses a plan that promises more than the device has free.
fn check_memory(plan: &Plan, options: &LoadOptions, device: &dyn Device) -> Result<()> {
    if options.allocator.is_some() || device.id() == DeviceId::Host {
        return Ok(()); // Another allocator has memory of its own; the host's system decides at the first touch.
    }
    let (needed_bytes, free_bytes) = (plan.promised().target_bytes, device.memory()?.free_bytes);
    if needed_bytes <= free_bytes {
        return Ok(());
    }
    Err(DeviceError::OutOfMemory { device: device.id(), needed_bytes, free_bytes: Some(free_bytes) }.into())
}

fn external(arena: &Arena, options: &LoadOptions) -> Option<Arc<dyn Allocation>> {
    let (_, memory) = options.targets.iter().find(|(name, _)| *name == arena.group)?;
    Some(Arc::new(memory.clone()))
}

/// Allocates the arenas, behind whatever the caller's stream still does with their memory.
fn allocate(plan: &Plan, options: &LoadOptions, device: &dyn Device) -> Result<Vec<Arc<dyn Allocation>>> {
    let allocate = |arena: &Arena| -> Result<Arc<dyn Allocation>> {
        if let Some(memory) = external(arena, options).filter(|_| arena.is_external) {
            return Ok(memory);
        }
        let Some(allocator) = &options.allocator else {
            return Ok(device.allocate(arena.len_bytes)?);
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
    let arenas = plan.arenas().iter().map(allocate).collect::<Result<Vec<_>>>()?;
    if let Some(stream) = options.stream {
        device.follow(stream)?;
        arenas.iter().for_each(|arena| arena.release_after(stream));
    }
    Ok(arenas)
}

/// Makes a ring no larger than the plan's staged reads can use; none when nothing is staged. Returns the seconds it took.
fn ring(plan: &Plan, options: &LoadOptions, device: &dyn Device) -> Result<(Option<Ring>, f64)> {
    let staged = plan.reads().iter().filter(|read| matches!(read.target, Target::Staged { .. })).count();
    if staged == 0 {
        return Ok((None, 0.0));
    }
    let (ring, seconds) = devices::ring(device, staging_layout(options)?.at_most(staged as u64))?;
    Ok((Some(ring), seconds))
}

/// Names the engines that read, each once.
fn engine_name(lanes: &[Lane]) -> String {
    let mut names: Vec<_> = lanes.iter().map(|lane| lane.engine.name()).collect();
    names.dedup();
    if names.is_empty() { "none".to_owned() } else { names.join("+") }
}

/// What turned out while reading.
fn late_fallbacks(done: &Transferred, device: &dyn Device) -> Vec<Fallback> {
    let mut fallbacks: Vec<_> =
        device.fallbacks().into_iter().map(|(what, why)| Fallback::new(what, why)).collect();
    if done.counts.direct_refused > 0 {
        let what = format!("{} direct reads were done through the page cache", done.counts.direct_refused);
        fallbacks
            .push(Fallback::new(what, "the system refused them (EINVAL) though the probe's read worked"));
    }
    fallbacks
}
