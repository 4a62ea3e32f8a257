//! The private hand-over: tensors in memory of their own, read by engines.

use std::collections::{BTreeSet, HashMap};
use std::thread::{self, Scope};
use std::time::Instant;

use tensorhaul_device::Near;
use tensorhaul_direct::Direct;
use tensorhaul_io::Counts;
use tensorhaul_plan::{DeviceId, External, InPlace, Machine, Plan, Request, Route, Select};
use tensorhaul_stage::{Placement, Ring};

use crate::assignment::Assignment;
use crate::cancel::Cancel;
use crate::devices::{self, Found};
use crate::error::{Error, Result};
use crate::handover::{Emit, staging_layout};
use crate::lanes::Reading;
use crate::mapping;
use crate::model::Inner;
use crate::options::{LoadOptions, Preference};
use crate::over_read;
use crate::parallel;
use crate::pipeline::{Dropped, Ended, Lane, Transfer, Transferred};
use crate::prepare::{self, Preparation, Prepared, PreparedDevice, Preparing, Side, timed};
use crate::probed::{Probed, Temperatures};
use crate::quantized;
use crate::report::{DeviceReport, Fallback, Phases, Report};
use crate::storage::{self, Hope, Storage};

/// What a plan may do to know the devices that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asking {
    /// Nothing: those whose driver this process has initialized are known, and of those that are open, which reach each other.
    Nobody,
    /// Initialize their drivers; open them, where it matters which reach each other.
    Devices,
}

/// Plans a private load and does nothing else.
pub(crate) fn plan(model: &Inner, options: &LoadOptions, asking: Asking) -> Result<Plan> {
    plan_of(model, options, &request(model, options)?, asking)
}

/// Plans a [request] that is complete.
pub(crate) fn plan_of(
    model: &Inner,
    options: &LoadOptions,
    request: &Request,
    asking: Asking,
) -> Result<Plan> {
    mapping::check(model, request)?;
    let probed = Probed::new(model, options);
    let ids = mapping::devices(request);
    let find = |id: &DeviceId| match asking {
        Asking::Nobody => devices::find_known(*id),
        Asking::Devices => devices::find(*id).ok(),
    };
    // Accelerators are opened to make a plan only where it matters which reach each other, so what direct storage can do is not known.
    let opened = match (mapping::replicates(request), asking) {
        (false, _) => Vec::new(),
        (true, Asking::Nobody) => ids.iter().filter_map(|id| find(id)?.opened().cloned()).collect(),
        (true, Asking::Devices) => devices::open_all(&ids).unwrap_or_default(),
    };
    let peers = devices::peers(&opened);
    // A load that needs it to land in place tries it, and is planned as if it worked.
    let is_counted_on = matches!(
        (options.direct_storage, options.in_place),
        (Preference::Required, _) | (Preference::Preferred, Preference::Required)
    );
    let accelerators = ids.iter().filter(|id| is_counted_on && **id != DeviceId::Host);
    let routes = accelerators.map(|id| storage::route_for_all(*id)).collect();
    // They are described where that is allowed, because one may share the host's memory.
    let able = |id: &DeviceId| find(id).is_some_and(|found| is_able(&found, *id, options));
    let able: Vec<_> = ids.iter().map(|id| (*id, able(id))).collect();
    let machine = machine(options, &able, peers, &probed, routes)?;
    Ok(Plan::new(&model.checkpoint, request, &machine)?)
}

/// Loads; forgets a device that failed, so that the next load opens it anew.
pub(crate) fn run(
    model: &Inner,
    options: &LoadOptions,
    cancel: &Cancel,
    emit: &mut Emit<'_>,
) -> Result<Report> {
    attempt(model, options, cancel, emit).inspect_err(devices::forget_failed)
}

/// Finds the devices beside the probe; then plans and reads, beside the devices' opening.
///
/// What can be refused without a context is refused before the first read. What needs one is refused when it is there, and
/// the lanes stop. Either way the context is waited for, because a driver's call cannot be interrupted.
fn attempt(model: &Inner, options: &LoadOptions, cancel: &Cancel, emit: &mut Emit<'_>) -> Result<Report> {
    let start = Instant::now();
    let request = request(model, options)?;
    mapping::check(model, &request)?;
    let ids = mapping::devices(&request);
    let (mut probed, (found, driver_seconds)) = thread::scope(|scope| {
        let finding = scope.spawn(|| timed(|| devices::find_all(&ids)));
        let probed = Probed::new(model, options);
        (probed, finding.join().expect("finding a device does not panic"))
    });
    let sides = ids.iter().zip(found?).map(|(id, found)| {
        let is_able = is_able(&found, *id, options);
        Side::new(*id, found, is_able)
    });
    let sides: Vec<_> = sides.collect();
    if options.direct_storage == Preference::Required && options.in_place != Preference::Off {
        storage::check_has_use(sides.iter().map(|side| (side.id, side.is_able)))?;
    }
    thread::scope(|scope| {
        let (mut sides, peers) = before_the_plan(sides, &request, options, scope)?;
        let able: Vec<_> = sides.iter().map(|side| (side.id, side.is_able)).collect();
        let probed_at = Instant::now();

        let plan = |routes| {
            let machine = machine(options, &able, peers.clone(), &probed, routes)?;
            Ok(Plan::new(&model.checkpoint, &request, &machine)?)
        };
        let (plan, storages, direct_storage_seconds) =
            storage::plan(&hopes(model, options, &sides, &probed), plan)?;
        if options.direct_storage == Preference::Required {
            storages.iter().try_for_each(|storage| storage.check_required(&plan, model))?;
        }
        prepare::check_external(&plan, &request, options)?;
        quantized::check_group_indices(model, plan.operations())?;
        let assignment = match *ids {
            [device] => Assignment::of_one(device, &plan),
            _ => Assignment::new(&plan),
        };
        // A map may name more devices than the tensors asked for go to.
        sides.retain(|side| assignment.devices().contains(&side.id));
        sides.iter().try_for_each(|side| side.check_memory(&plan, options))?;
        let sides: Vec<_> = sides.into_iter().map(|side| side.open(scope)).collect();
        let planned_at = Instant::now();

        let temperatures = Temperatures::new(model, &plan, &probed);
        let mut fallbacks = std::mem::take(&mut probed.fallbacks);
        fallbacks.extend(storages.iter().flat_map(Storage::fallbacks));
        fallbacks.extend(storages.iter().filter_map(|storage| storage.staged_fallback(&plan)));
        fallbacks.extend(parallel::fallbacks(&plan));
        fallbacks.extend(over_read::fallbacks(&plan));
        // Ranks of one process have parts of the same tensors; only a map asks for copies.
        if mapping::replicates(&request) {
            fallbacks.extend(out_of_reach(&plan, &assignment));
        }
        if options.dequantization.is_some() {
            fallbacks.extend(quantized::warnings(model)?);
        }
        let device_count = ids.len();
        let load = Load {
            model,
            plan: &plan,
            assignment: &assignment,
            temperatures: &temperatures,
            storages: &storages,
            options,
            device_count,
            cancel,
        };
        let Read { rings, prepared, started_at, done, engine, fallbacks } =
            load.read(sides, fallbacks, emit)?;
        model.check_unchanged(plan.reads().iter().map(|read| read.extent.file))?;

        let since = |later: Option<Instant>, earlier: Instant| {
            later.map_or(0.0, |later| later.saturating_duration_since(earlier).as_secs_f64())
        };
        let first_byte_at = done.first_byte.unwrap_or(started_at);
        let promised = *plan.promised();
        let peak_staging_bytes = rings.iter().flatten().map(Ring::peak_bytes).sum();
        let report = Report {
            bytes: promised.payload_bytes,
            tensors: plan.tensors().len() as u64,
            device: assignment.devices().iter().map(DeviceId::to_string).collect::<Vec<_>>().join(", "),
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
                probe_seconds: (probed_at - start).as_secs_f64() + direct_storage_seconds,
                plan_seconds: (planned_at - probed_at).as_secs_f64() - direct_storage_seconds,
                prepare_seconds: (started_at - planned_at).as_secs_f64(),
                first_byte_seconds: since(done.first_byte, started_at),
                read_seconds: since(Some(done.finished), first_byte_at),
                driver_seconds,
                direct_storage_seconds,
                hidden_seconds: since(done.ahead.last_byte, started_at).min(prepared.seconds()),
                first_copy_seconds: since(done.first_copy, first_byte_at),
                ..prepared.phases()
            },
            devices: match request.device_map.is_some() || ids.len() > 1 {
                true => device_reports(&plan, &assignment, &prepared, &rings),
                false => Vec::new(),
            },
            fallbacks,
            checksums: done.checksums,
            ..Report::of((done.finished - start).as_secs_f64(), promised.payload_bytes)
        };
        cancel.lets_go(); // A cancellation from now on is not of these rings' load.
        for (ring, PreparedDevice { device, .. }) in rings.into_iter().zip(&prepared.devices) {
            ring.into_iter().for_each(|ring| devices::keep(&**device, ring));
        }
        Ok(report)
    })
}

/// Which devices copy to which directly, the source first.
type Peers = Vec<(DeviceId, DeviceId)>;

/// Opens devices as far as it is good to do before there is a plan: a single one begins now, several when the plan says which of them tensors go
/// to. Where tensors go to several, all are waited for, because only then they tell which of them reach each other; where direct storage is
/// wanted, because only then files can be tried.
fn before_the_plan<'scope>(
    sides: Vec<Side<'scope>>,
    request: &Request,
    options: &LoadOptions,
    scope: &'scope Scope<'scope, '_>,
) -> Result<(Vec<Side<'scope>>, Peers)> {
    let is_waited_for = mapping::replicates(request) || options.direct_storage != Preference::Off;
    if sides.len() > 1 && !is_waited_for {
        return Ok((sides, Vec::new()));
    }
    let sides: Vec<_> = sides.into_iter().map(|side| side.open(scope)).collect();
    if !is_waited_for {
        return Ok((sides, Vec::new()));
    }
    let sides = sides.into_iter().map(Side::opened).collect::<Result<Vec<_>>>()?;
    let opened: Vec<_> = sides.iter().filter_map(Side::device).cloned().collect();
    Ok((sides, devices::peers(&opened)))
}

/// Returns the accelerators that storage may read into, where the load wants direct storage.
fn hopes<'h>(
    model: &'h Inner,
    options: &'h LoadOptions,
    sides: &'h [Side<'_>],
    probed: &Probed,
) -> Vec<Hope<'h>> {
    if options.direct_storage == Preference::Off {
        return Vec::new();
    }
    let accelerators = sides.iter().filter_map(Side::device).filter(|device| device.id() != DeviceId::Host);
    accelerators.map(|device| Hope::new(model, options, device, probed)).collect()
}

/// A load that is planned.
struct Load<'l> {
    model: &'l Inner,
    plan: &'l Plan,
    assignment: &'l Assignment,
    temperatures: &'l Temperatures,
    storages: &'l [Storage],
    options: &'l LoadOptions,
    /// Among how many the staging budget is shared, which may be more than the plan uses.
    device_count: usize,
    cancel: &'l Cancel,
}

/// What reading left.
struct Read {
    rings: Vec<Option<Ring>>,
    prepared: Prepared,
    /// When the lanes started.
    started_at: Instant,
    done: Transferred,
    engine: String,
    fallbacks: Vec<Fallback>,
}

impl Load<'_> {
    /// Reads beside the devices' preparation, or after it where reads cannot begin without.
    ///
    /// When a device refuses to pin its ring, everything is read once more, through rings of the driver's own.
    fn read(&self, sides: Vec<Side<'_>>, mut fallbacks: Vec<Fallback>, emit: &mut Emit<'_>) -> Result<Read> {
        let Load { model, plan, assignment, temperatures, options, device_count, cancel, .. } = *self;
        let near: Vec<_> = sides.iter().map(|side| side.near.clone()).collect();
        let reading = Reading { model, options, plan, temperatures, assignment, near: &near };
        let mut rings = rings(plan, assignment, &near, options, device_count)?;
        let mut dropped = Counts::default();
        let mut preparing = self.preparing(sides, &rings)?;
        loop {
            if preparing.beside.is_none() {
                self.replace_refused(&mut rings, &mut preparing.done)?;
            }
            rings.iter().flatten().for_each(|ring| cancel.closes(ring));
            let mut told = Vec::new();
            let lanes = reading.lanes(&rings, self.engines(&preparing.done, &mut told), &mut told)?;
            let started_at = Instant::now();
            let transfer = Transfer { model, plan, assignment, rings: &rings, options, cancel };
            match transfer.run(&lanes, &temperatures.access, preparing, emit)? {
                Ended::Complete(mut done, prepared) => {
                    done.counts += dropped;
                    fallbacks.extend(told);
                    for (id, ring) in assignment.devices().iter().zip(&rings) {
                        fallbacks
                            .extend(ring.as_ref().and_then(|ring| devices::placement_fallback(*id, ring)));
                    }
                    fallbacks.extend(late_fallbacks(&done, &prepared));
                    let engine = engine_name(&lanes);
                    return Ok(Read { rings, prepared, started_at, done, engine, fallbacks });
                }
                Ended::Refused(done, Dropped { bytes, counts }) => {
                    dropped = counts;
                    if bytes > 0 {
                        let what = format!("{bytes} bytes were read twice");
                        fallbacks
                            .push(Fallback::new(what, "the driver refused to pin the memory they were in"));
                    }
                    preparing = Preparing { done, beside: None };
                }
            }
        }
    }

    /// Makes the engines of direct storage, each with the number of the device it reads into.
    fn engines(&self, prepared: &[PreparedDevice], told: &mut Vec<Fallback>) -> Vec<(usize, Direct)> {
        let engine = |device: &PreparedDevice| {
            let storage = self.storages.iter().find(|storage| storage.device() == device.device.id())?;
            Some((device.number, storage.engine(self.plan, device, self.options, told)?))
        };
        prepared.iter().filter_map(engine).collect()
    }

    /// Makes those devices ready that reads cannot begin without: whose memory they land in, and whose driver has refused to pin before. The others
    /// become so beside the reads.
    fn preparing<'p>(&'p self, sides: Vec<Side<'p>>, rings: &[Option<Ring>]) -> Result<Preparing<'p>> {
        let Load { plan, assignment, options, cancel, .. } = *self;
        let needs_pin = |side: &Side<'_>, ring: &Option<Ring>| {
            devices::pinning_was_refused(side.id) && ring.as_ref().is_some_and(|ring| ring.pinned().is_none())
        };
        let sides = sides.into_iter().zip(rings).enumerate();
        let (now, beside): (Vec<_>, Vec<_>) =
            sides.partition(|(number, (side, ring))| assignment.lands(*number) || needs_pin(side, ring));
        let flat = |sides: Vec<(usize, (Side<'p>, &Option<Ring>))>| {
            let sides = sides.into_iter();
            sides.map(|(number, (side, ring))| (number, side, ring.clone())).collect::<Vec<_>>()
        };
        let (now, beside) = (flat(now), flat(beside));
        let preparation = Preparation { plan, assignment, options, cancel };
        let done = preparation.prepare(now)?;
        if beside.is_empty() {
            return Ok(Preparing { done, beside: None });
        }
        Ok(Preparing { done, beside: Some(Box::new(move || preparation.prepare(beside))) })
    }

    /// Replaces rings that a device refused to pin, and those that were closed because of that, by memory of the driver's own.
    fn replace_refused(&self, rings: &mut [Option<Ring>], prepared: &mut [PreparedDevice]) -> Result<()> {
        for device in prepared {
            let ring = &mut rings[device.number];
            let Some(refused) = ring.take_if(|ring| device.pinned.is_none() || ring.is_closed()) else {
                continue;
            };
            let layout = refused.layout();
            self.cancel.lets_go();
            device.pinned = None;
            drop(refused); // Before the other is taken: the budget is for one.
            let own = devices::drivers_own_ring(&*device.device, layout)?;
            device.pinned = own.pinned();
            *ring = Some(own);
        }
        Ok(())
    }
}

/// Completes the request with what the options say, and with what is quantized where that is asked for.
pub(crate) fn request(model: &Inner, options: &LoadOptions) -> Result<Request> {
    let mut request = options.request.clone();
    request.external.extend(options.targets.iter().map(|(name, memory)| External {
        name: name.clone(),
        device: memory.place(),
        strides: memory.held().and_then(|layout| layout.strides.clone()),
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

/// Tells whether reads can land in the memory of a result on this device. Another allocator's is not known to be the host's.
fn is_able(found: &Found, device: DeviceId, options: &LoadOptions) -> bool {
    let is_own = options.allocator.is_none() || device == DeviceId::Host;
    found.capabilities().in_place && is_own
}

/// Describes the machine to the planner: the devices of the load and whether storage can write into their memory, and the ways of direct storage.
fn machine(
    options: &LoadOptions,
    able: &[(DeviceId, bool)],
    peers: Peers,
    probed: &Probed,
    routes: Vec<Route>,
) -> Result<Machine> {
    let layout = staging_layout(options, able.len())?;
    let buffer_len_bytes = layout.buffer_len_bytes() as u64;
    let has_route = |device: DeviceId| routes.iter().any(|route| route.device == device);
    let unable = able.iter().find(|(device, is_able)| !is_able && !has_route(*device));
    let mut in_place = match (options.in_place, unable) {
        (Preference::Required, Some((device, _))) => {
            let what = format!("{device}: storage cannot write into its memory");
            return Err(Error::bad_request(what));
        }
        (Preference::Off, _) => InPlace::never(),
        (Preference::Preferred | Preference::Required, _) => {
            let shared = able.iter().filter(|(_, is_able)| *is_able);
            let routes =
                shared.flat_map(|(device, _)| InPlace::shared(*device, buffer_len_bytes).routes).collect();
            InPlace { routes }
        }
    };
    // Arenas that storage writes into are the host's, which drivers take for no device's when they copy between two.
    let is_of_device = |id: &DeviceId| !in_place.is_hosts(*id);
    let mut peers = peers;
    peers.retain(|(source, target)| is_of_device(source) && is_of_device(target));
    let direct_align_bytes = storage::add_routes(&mut in_place, routes, probed.direct_align_bytes);
    Ok(Machine {
        buffer_len_bytes,
        buffer_count: layout.buffer_count().saturating_mul(able.len() as u32),
        direct_align_bytes,
        in_place,
        peers,
    })
}

/// Takes a ring for each device, near it, no larger than the reads staged for it can use; none where nothing is.
fn rings(
    plan: &Plan,
    assignment: &Assignment,
    near: &[Near],
    options: &LoadOptions,
    device_count: usize,
) -> Result<Vec<Option<Ring>>> {
    let layout = staging_layout(options, device_count)?;
    let staged: Vec<_> = (0..assignment.devices().len()).map(|device| assignment.staged(device)).collect();
    let reads: Vec<u64> = staged.iter().map(|staged| staged.reads).collect();
    let counts = share_out(plan.machine().buffer_count, &reads);
    let ring = |(device, count): (usize, u32)| {
        let staged = &staged[device];
        if count == 0 {
            return Ok(None);
        }
        debug_assert!(staged.read_len_bytes_max <= plan.machine().buffer_len_bytes);
        let layout = layout.of_count(count).for_reads_of(staged.read_len_bytes_max);
        devices::ring(assignment.devices()[device], layout, &near[device]).map(Some)
    };
    counts.into_iter().enumerate().map(ring).collect()
}

/// Shares staging buffers out to devices by the reads staged for each: as many as it can use, and of what is left equal parts to those
/// that can use more.
fn share_out(buffer_count: u32, reads: &[u64]) -> Vec<u32> {
    let mut counts = vec![0; reads.len()];
    let mut by_need: Vec<usize> = (0..reads.len()).collect();
    by_need.sort_by_key(|device| reads[*device]);
    let mut left = buffer_count;
    for (place, device) in by_need.into_iter().enumerate() {
        let equal = left / (reads.len() - place) as u32;
        counts[device] = equal.min(u32::try_from(reads[device]).unwrap_or(u32::MAX));
        left -= counts[device];
    }
    counts
}

/// Counts the host memory that the load allocated for its result.
fn host_bytes(plan: &Plan, prepared: &Prepared) -> u64 {
    let arenas = plan.arenas().iter().zip(&prepared.arenas);
    let own = arenas.filter(|(arena, memory)| !arena.is_external && memory.host_ptr().is_some());
    own.map(|(_, memory)| memory.len_bytes()).sum()
}

/// Tells what of a load was whose.
fn device_reports(
    plan: &Plan,
    assignment: &Assignment,
    prepared: &Prepared,
    rings: &[Option<Ring>],
) -> Vec<DeviceReport> {
    let of_ring = |(id, ring): (&DeviceId, &Option<Ring>)| DeviceReport {
        device: id.to_string(),
        peak_staging_bytes: ring.as_ref().map_or(0, Ring::peak_bytes),
        staging_node: match ring.as_ref().map(Ring::placement) {
            Some(Placement::Near(node)) => Some(node),
            _ => None,
        },
        ..DeviceReport::default()
    };
    let mut reports: Vec<_> = assignment.devices().iter().zip(rings).map(of_ring).collect();
    for tensor in plan.tensors() {
        let report = &mut reports[assignment.of_arena(tensor.place.arena)];
        report.tensors += 1;
        report.bytes += tensor.len_bytes;
        report.bytes_from_peers += tensor.copy_of.map_or(0, |_| tensor.len_bytes);
    }
    for (number, arena) in (0..).zip(plan.arenas()).filter(|(_, arena)| !arena.is_external) {
        let report = &mut reports[assignment.of_arena(number)];
        let taken = if arena.is_scratch { &mut report.transient_bytes } else { &mut report.target_bytes };
        *taken += arena.len_bytes;
    }
    for (number, read) in (0..).zip(plan.reads()) {
        reports[assignment.of_read(number)].reads += 1;
        for copy in plan.copies(read) {
            reports[assignment.of_arena(copy.target.arena)].copies += 1;
        }
    }
    for (report, PreparedDevice { phases, .. }) in reports.iter_mut().zip(&prepared.devices) {
        report.context_seconds = phases.context_seconds;
        report.allocate_seconds = phases.allocate_seconds;
        report.pin_seconds = phases.pin_seconds;
        report.module_seconds = phases.module_seconds;
    }
    reports
}

/// Names the engines that read, each once.
fn engine_name(lanes: &[Lane]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for lane in lanes {
        if !names.contains(&lane.engine.name()) {
            names.push(lane.engine.name());
        }
    }
    if names.is_empty() { "none".to_owned() } else { names.join("+") }
}

/// What turned out while reading.
fn late_fallbacks(done: &Transferred, prepared: &Prepared) -> Vec<Fallback> {
    let mut fallbacks = Vec::new();
    for PreparedDevice { device, .. } in &prepared.devices {
        for (what, why) in device.fallbacks() {
            let is_single = prepared.devices.len() == 1;
            let what = if is_single { what } else { format!("{}: {what}", device.id()) };
            fallbacks.push(Fallback::new(what, why));
        }
    }
    if done.counts.direct_refused > 0 {
        let what = format!("{} direct reads were done through the page cache", done.counts.direct_refused);
        fallbacks
            .push(Fallback::new(what, "the system refused them (EINVAL) though the probe's read worked"));
    }
    fallbacks
}

/// Tells which devices got through the staging ring, or by reads of their own, what another has too, and why it did not come from there.
fn out_of_reach(plan: &Plan, assignment: &Assignment) -> Vec<Fallback> {
    let mut staged: HashMap<_, BTreeSet<DeviceId>> = HashMap::new();
    for tensor in plan.tensors().iter().filter(|tensor| tensor.copy_of.is_none()) {
        let device = assignment.devices()[assignment.of_arena(tensor.place.arena)];
        staged.entry((tensor.id, tensor.name)).or_default().insert(device);
    }
    let pairs = staged.values().flat_map(|devices| {
        devices.iter().flat_map(|target| devices.iter().map(|source| (*source, *target)))
    });
    let is_missed = |(source, target): &(DeviceId, DeviceId)| {
        let is_alike = std::mem::discriminant(source) == std::mem::discriminant(target);
        source != target && is_alike && !plan.machine().peers.contains(&(*source, *target))
    };
    let missed: BTreeSet<_> = pairs.filter(is_missed).collect();
    let is_hosts = |device: DeviceId| {
        plan.machine().in_place.routes.iter().any(|route| route.device == device && route.is_hosts)
    };
    let told = |(source, target): (DeviceId, DeviceId)| {
        let what = format!("{target}: what {source} has too came through the staging ring, not from there");
        let why = match [source, target].into_iter().find(|device| is_hosts(*device)) {
            Some(device) => format!(
                "the memory of {device} is the host's, which drivers copy between devices as no device's: it is staged to each instead"
            ),
            None => format!("{target} does not reach the memory of {source}"),
        };
        Fallback::new(what, why)
    };
    missed.into_iter().map(told).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_that_one_device_has_no_use_for_are_the_others() {
        assert_eq!(share_out(64, &[1000]), [64]);
        assert_eq!(share_out(64, &[1000, 1000]), [32, 32]);
        assert_eq!(share_out(64, &[0, 1000]), [0, 64], "the host's part is read in place");
        assert_eq!(share_out(64, &[1000, 4, 1000]), [30, 4, 30]);
        assert_eq!(share_out(64, &[3, 2]), [3, 2]);
        assert_eq!(share_out(2, &[u64::MAX, 1]), [1, 1]);
    }
}
