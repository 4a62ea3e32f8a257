//! The private hand-over: tensors in memory of their own, read by engines.

use std::thread;
use std::time::Instant;

use tensorhaul_device::Device;
use tensorhaul_io::Counts;
use tensorhaul_plan::{DeviceId, External, InPlace, Machine, Plan, Request, Route, Select};
use tensorhaul_stage::Ring;

use crate::cancel::Cancel;
use crate::devices;
use crate::error::{Error, ErrorKind, Result};
use crate::handover::{Emit, staging_layout};
use crate::lanes::lanes;
use crate::model::Inner;
use crate::options::{LoadOptions, Preference};
use crate::parallel;
use crate::pipeline::{Dropped, Ended, Lane, Transfer, Transferred};
use crate::prepare::{self, Opening, Prepared, Preparing, timed};
use crate::probed::{Probed, Temperatures};
use crate::quantized;
use crate::report::{Fallback, Phases, Report};
use crate::storage::{self, Storage};

/// Plans a private load and does nothing else.
pub(crate) fn plan(model: &Inner, options: &LoadOptions) -> Result<Plan> {
    let probed = Probed::new(model, options);
    // An accelerator is not opened to make a plan: what storage can write into its memory is not known.
    let device = options.request.device;
    let route = (options.direct_storage == Preference::Required).then(|| storage::route_for_all(device));
    let machine = machine(options, device == DeviceId::Host, &probed, route)?;
    Ok(Plan::new(&model.checkpoint, &request(model, options)?, &machine)?)
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

/// Finds the device beside the probe; then plans and reads, beside the device's opening.
///
/// What can be refused without a context is refused before the first read. What needs one is refused when it is there, and
/// the lanes stop. Either way the context is waited for, because a driver's call cannot be interrupted.
fn attempt(model: &Inner, options: &LoadOptions, cancel: &Cancel, emit: &mut Emit<'_>) -> Result<Report> {
    let start = Instant::now();
    let request = request(model, options)?;
    let (mut probed, (found, driver_seconds)) = thread::scope(|scope| {
        let finding = scope.spawn(|| timed(|| devices::find(options.request.device)));
        let probed = Probed::new(model, options);
        (probed, finding.join().expect("finding a device does not panic"))
    });
    let found = found?;
    let (able, total_bytes) = (found.capabilities().in_place, found.total_bytes());
    let near_processors = found.near_processors();
    thread::scope(|scope| {
        let mut opening = Opening::start(found, scope);
        let (mut storage, mut direct_storage_seconds) = (None, 0.0);
        if options.direct_storage != Preference::Off && options.request.device != DeviceId::Host {
            let (device, context_seconds) = opening.wait()?;
            let decide = || Storage::decide(model, options, &device, &probed);
            let (decided, seconds) = timed(decide);
            (storage, direct_storage_seconds) = (Some(decided), seconds);
            opening = Opening::Done(device, context_seconds);
        }
        let route = storage.as_ref().and_then(Storage::route);
        let machine = machine(options, able, &probed, route)?;
        let probed_at = Instant::now();

        let plan = Plan::new(&model.checkpoint, &request, &machine)?;
        if let Some(storage) = storage.as_ref().filter(|_| options.direct_storage == Preference::Required) {
            storage.check_required(&plan, model)?;
        }
        prepare::check_external(&plan, options)?;
        quantized::check_group_indices(model, &plan)?;
        if let Some(total_bytes) = total_bytes {
            prepare::check_total(&plan, options, total_bytes)?;
        }
        opening.check_memory(&plan, options)?;
        let planned_at = Instant::now();

        let temperatures = Temperatures::new(model, &plan, &probed);
        let mut fallbacks = std::mem::take(&mut probed.fallbacks);
        fallbacks.extend(storage.iter().flat_map(Storage::fallbacks));
        if options.dequantization.is_some() {
            fallbacks.extend(quantized::warnings(model)?);
        }
        let load = Load {
            model,
            plan: &plan,
            temperatures: &temperatures,
            storage: storage.as_ref(),
            near_processors,
            options,
            cancel,
        };
        let Read { ring, prepared, started_at, done, engine, fallbacks } =
            load.read(opening, fallbacks, emit)?;
        model.check_unchanged(plan.reads().iter().map(|read| read.extent.file))?;

        let since = |later: Option<Instant>, earlier: Instant| {
            later.map_or(0.0, |later| later.saturating_duration_since(earlier).as_secs_f64())
        };
        let first_byte_at = done.first_byte.unwrap_or(started_at);
        let promised = *plan.promised();
        let peak_staging_bytes = ring.as_ref().map_or(0, Ring::peak_bytes);
        let report = Report {
            bytes: promised.payload_bytes,
            tensors: plan.tensors().len() as u64,
            device: options.request.device.to_string(),
            engine,
            handover: "private",
            resident: true,
            bytes_hot: temperatures.hot_bytes,
            bytes_cold: temperatures.cold_bytes,
            bytes_direct: temperatures.direct_bytes,
            bytes_ahead: done.ahead.bytes,
            bytes_in_place: promised.in_place_bytes,
            bytes_direct_storage: temperatures.storage_bytes,
            peak_staging_bytes,
            peak_host_bytes: host_bytes(&plan, &prepared) + peak_staging_bytes,
            promised,
            reads: promised.reads,
            requests: done.counts.requests,
            system_calls: done.counts.system_calls,
            phases: Phases {
                probe_seconds: (probed_at - start).as_secs_f64(),
                plan_seconds: (planned_at - probed_at).as_secs_f64(),
                prepare_seconds: (started_at - planned_at).as_secs_f64(),
                first_byte_seconds: since(done.first_byte, started_at),
                read_seconds: since(Some(done.finished), first_byte_at),
                driver_seconds,
                direct_storage_seconds,
                hidden_seconds: since(done.ahead.last_byte, started_at).min(prepared.seconds()),
                first_copy_seconds: since(done.first_copy, first_byte_at),
                ..prepared.phases
            },
            fallbacks,
            checksums: done.checksums,
            ..Report::of((done.finished - start).as_secs_f64(), promised.payload_bytes)
        };
        if let Some(ring) = ring {
            devices::keep(&*prepared.device, ring, cancel);
        }
        Ok(report)
    })
}

/// A load that is planned.
struct Load<'l> {
    model: &'l Inner,
    plan: &'l Plan,
    temperatures: &'l Temperatures,
    storage: Option<&'l Storage>,
    near_processors: Vec<u32>,
    options: &'l LoadOptions,
    cancel: &'l Cancel,
}

/// What reading left.
struct Read {
    ring: Option<Ring>,
    prepared: Prepared,
    /// When the lanes started.
    started_at: Instant,
    done: Transferred,
    engine: String,
    fallbacks: Vec<Fallback>,
}

impl Load<'_> {
    /// Reads beside the device's preparation, or after it where reads cannot begin without.
    ///
    /// When the device refuses to pin the ring, everything is read once more, through a ring of its driver's own.
    fn read(&self, opening: Opening<'_>, mut fallbacks: Vec<Fallback>, emit: &mut Emit<'_>) -> Result<Read> {
        let Load { model, plan, options, cancel, .. } = *self;
        let mut ring = ring(plan, options)?;
        let mut dropped = Counts::default();
        let needs_arenas = plan.promised().in_place_bytes > 0;
        let needs_pin = devices::pinning_was_refused(options.request.device)
            && ring.as_ref().is_some_and(|ring| ring.pinned().is_none());
        let prepare = {
            let ring = ring.clone();
            move || prepare::prepare(plan, options, cancel, ring.as_ref(), opening)
        };
        let mut preparing = if needs_arenas || needs_pin {
            Preparing::Done(prepare()?)
        } else {
            Preparing::Beside(Box::new(prepare))
        };
        loop {
            if let Preparing::Done(prepared) = &mut preparing
                && let Some(refused) = ring.take_if(|_| prepared.pinned.is_none())
            {
                let layout = refused.layout();
                cancel.lets_go();
                drop(refused); // Before the other is taken: the budget is for one.
                let own = devices::drivers_own_ring(&*prepared.device, layout)?;
                prepared.pinned = own.pinned();
                ring = Some(own);
            }
            if let Some(ring) = &ring {
                cancel.closes(ring);
            }
            let mut told = Vec::new();
            let direct = match (&preparing, self.storage) {
                (Preparing::Done(prepared), Some(storage)) => {
                    storage.engine(plan, prepared, options, &mut told)
                }
                _ => None,
            };
            let lanes = lanes(
                model,
                options,
                plan,
                self.temperatures,
                ring.as_ref(),
                direct,
                &self.near_processors,
                &mut told,
            )?;
            let started_at = Instant::now();
            let transfer = Transfer { model, plan, ring: ring.clone(), options, cancel };
            match transfer.run(&lanes, &self.temperatures.access, preparing, emit)? {
                Ended::Complete(mut done, prepared) => {
                    done.counts += dropped;
                    fallbacks.extend(told);
                    fallbacks.extend(late_fallbacks(&done, &*prepared.device));
                    let engine = engine_name(&lanes);
                    return Ok(Read { ring, prepared, started_at, done, engine, fallbacks });
                }
                Ended::Refused(prepared, Dropped { bytes, counts }) => {
                    dropped = counts;
                    if bytes > 0 {
                        let what = format!("{bytes} bytes were read twice");
                        fallbacks
                            .push(Fallback::new(what, "the driver refused to pin the memory they were in"));
                    }
                    preparing = Preparing::Done(prepared);
                }
            }
        }
    }
}

/// Completes the request with what the options say, and with what is quantized where that is asked for.
pub(crate) fn request(model: &Inner, options: &LoadOptions) -> Result<Request> {
    let mut request = options.request.clone();
    request.external.extend(options.targets.iter().map(|(name, memory)| External {
        name: name.clone(),
        device: memory.place(),
        strides: None,
    }));
    if let Some(dequantization) = &options.dequantization {
        // A rank's tensors have names of their own; which stored ones they need is not known yet.
        let select = if options.parallel.is_some() { &Select::All } else { &options.request.select };
        request.dequantize = Some(quantized::dequantize(model, dequantization, select)?);
        request.transient_bytes_max = options.transient_bytes;
    }
    if let Some(parallel) = &options.parallel {
        parallel::assemble(model, parallel, &mut request)?;
    }
    Ok(request)
}

/// Describes the machine; `route` is the way of direct storage into the device's memory.
fn machine(options: &LoadOptions, able: bool, probed: &Probed, route: Option<Route>) -> Result<Machine> {
    let layout = staging_layout(options)?;
    let buffer_len_bytes = layout.buffer_len_bytes() as u64;
    let mut in_place = match options.in_place {
        Preference::Preferred | Preference::Required if able => InPlace::host(buffer_len_bytes),
        Preference::Required if route.is_none() => {
            return Err(Error::bad_request(format!(
                "{}: storage cannot write into its memory",
                options.request.device
            )));
        }
        _ => InPlace::never(),
    };
    let direct_align_bytes = storage::add_route(&mut in_place, route, probed.direct_align_bytes);
    Ok(Machine {
        buffer_len_bytes,
        buffer_count: layout.buffer_count(),
        direct_align_bytes,
        in_place,
        peers: Vec::new(),
    })
}

/// Takes a ring no larger than the plan's staged reads can use; none when nothing is staged.
fn ring(plan: &Plan, options: &LoadOptions) -> Result<Option<Ring>> {
    let staged = plan.staged();
    if staged.reads == 0 {
        return Ok(None);
    }
    let layout = staging_layout(options)?.at_most(staged.reads).for_reads_of(staged.read_len_bytes_max);
    devices::ring(options.request.device, layout).map(Some)
}

/// Counts the host memory that the load allocated for its result.
fn host_bytes(plan: &Plan, prepared: &Prepared) -> u64 {
    let arenas = plan.arenas().iter().zip(&prepared.arenas);
    let own = arenas.filter(|(arena, memory)| !arena.is_external && memory.host_ptr().is_some());
    own.map(|(_, memory)| memory.len_bytes()).sum()
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
