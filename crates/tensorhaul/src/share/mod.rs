//! Loads that ranks of one node share: each reads its share of what any of them needs, and hands on what is others'.

mod copies;
mod feed;
mod memory;
mod node;
mod rounds;

use std::collections::HashSet;
use std::fmt::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tensorhaul_device::{Device, DeviceError, OperationKind, Stream};
use tensorhaul_exchange::{Exchange, ExchangeError, LaunchError};
use tensorhaul_plan::{Assembly, DeviceId, InPlace, Machine, Select, Share, ShareError, SharePromised};
use xxhash_rust::xxh3::Xxh3;

use crate::assignment::Assignment;
use crate::cancel::Cancel;
use crate::devices;
use crate::error::{Error, ErrorKind, Result};
use crate::handover::{Ready, staging_layout};
use crate::lanes::Reading;
use crate::loaded::{Entry, Tensors};
use crate::model::{Inner, Model};
use crate::options::{Handover, LoadOptions, Preference};
use crate::over_read;
use crate::parallel;
use crate::probed::{Probed, Temperatures};
use crate::quantized;
use crate::report::Fallback;
use crate::tensor::{Storage, Tensor};
use memory::Memory;
pub use node::{Carrier, NodeOptions, launched, node_device, node_exchange};
use rounds::Rounds;

/// One rank's tensors, and the report of how they came.
#[derive(Debug)]
pub struct SharedLoaded {
    /// The tensors, by their names in this rank's assembly.
    pub tensors: Tensors,
    /// What this rank did.
    pub report: SharedReport,
}

/// What one rank of a shared load did.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct SharedReport {
    /// Its place on the node.
    pub rank: u32,
    /// Ranks that shared the reading.
    pub size: u32,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Number of its tensors.
    pub tensors: u64,
    /// From the call until every byte was where it belongs.
    pub seconds: f64,
    /// `bytes` by `seconds`, in 1e9 bytes a second.
    pub gb_per_s: f64,
    /// Where the tensors are.
    pub device: String,
    /// Who read.
    pub engine: String,
    /// What moved bytes between the ranks.
    pub exchange: String,
    /// Bytes that it read, for itself and for others.
    pub read_bytes: u64,
    /// Bytes that all ranks read together, by the plan.
    pub read_bytes_of_all: u64,
    /// Bytes that it sent, counted for each peer.
    pub sent_bytes: u64,
    /// Bytes that it received.
    pub received_bytes: u64,
    /// Exchanges of all ranks.
    pub rounds: u64,
    /// Device memory that the exchange took, free again now.
    pub exchange_bytes: u64,
    /// The most host memory that the exchange took for messages, as the share promises it; sockets do, links take none.
    pub carrier_bytes: u64,
    /// The most staging memory that was in use.
    pub peak_staging_bytes: u64,
    /// Tensors, or parts of them, that it dequantized.
    pub operations: u64,
    /// Device memory that sources of these took, free again now.
    pub transient_bytes: u64,
    /// Requests that engines gave to the system.
    pub requests: u64,
    /// What the share promised.
    pub promised: SharePromised,
    /// What could not be done as preferred, and why.
    pub fallbacks: Vec<Fallback>,
}

impl Model {
    /// Plans what the ranks of a node read together, without doing it; `ranks` has one assembly for each, the same list on all of them.
    ///
    /// # Errors
    /// As [`load_shared`](Model::load_shared) before its first read.
    pub fn plan_shared(&self, options: &LoadOptions, ranks: &[Assembly]) -> Result<Share> {
        plan(&self.inner, options, ranks)
    }

    /// Loads this rank's tensors together with the other ranks of the node: what any of them needs is read once over all, and exchanged over
    /// the devices' links. Every rank calls it with the same files, `ranks` and options, but for the device; `ranks` has each
    /// rank's assembly, in their order, and `exchange` knows which is this one's.
    ///
    /// Of the request the device, what is selected (by the names of the ranks' tensors), the over-read and the budget count. What is
    /// dequantized is exchanged as it is stored, and each rank makes its own part of the numbers. Tensors are handed over when all are
    /// there. [`Exchange::abort`], from another thread, cancels the load on all ranks.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] for options that a shared load does not know, and when ranks load different things; else as
    /// [`load`](Model::load). When one rank fails, all do, and the exchange is of no more use.
    pub fn load_shared(
        &self,
        options: &LoadOptions,
        ranks: &[Assembly],
        exchange: &dyn Exchange,
    ) -> Result<SharedLoaded> {
        let result = load(&self.inner, options, ranks, exchange);
        if let Err(error) = &result {
            exchange.abort();
            devices::forget_failed(error);
        }
        result
    }
}

fn plan(model: &Inner, options: &LoadOptions, ranks: &[Assembly]) -> Result<Share> {
    check_options(options)?;
    let layout = staging_layout(options, 1)?;
    let machine = Machine {
        buffer_len_bytes: layout.buffer_len_bytes() as u64,
        buffer_count: layout.buffer_count(),
        // Not what was probed: a page cache that fills meanwhile would give ranks different plans.
        direct_align_bytes: if model.files().is_empty() { 1 } else { DIRECT_ALIGN_BYTES },
        in_place: InPlace::never(),
        peers: Vec::new(),
    };
    let mut request = options.request.clone();
    if let Some(dequantization) = &options.dequantization {
        // The ranks' tensors have names of their own; which stored ones they need is not known yet.
        request.dequantize = Some(quantized::dequantize(model, dequantization, &Select::All)?);
        request.transient_bytes_max = options.transient_bytes;
    }
    let share = Share::new(&model.checkpoint, ranks, &request, &machine)?;
    for rank in 0..share.size() {
        let needed_bytes = share.promised(rank).target_bytes;
        if let Some(max_bytes) = options.request.target_bytes_max.filter(|max| *max < needed_bytes) {
            return Err(tensorhaul_plan::PlanError::OverBudget { needed_bytes, max_bytes }.into());
        }
    }
    Ok(share)
}

/// Refuses what ranks that share their reading do not do, rather than leave it out.
fn check_options(options: &LoadOptions) -> Result<()> {
    let request = &options.request;
    let obstacle = if request.assembly.is_some() {
        Some("the request has an assembly; each rank's is given beside it")
    } else if !request.slices.is_empty() {
        Some("slices are asked for; what a rank ends with is its assembly")
    } else if request.device_map.is_some() {
        Some("a device map is given; each rank has one device")
    } else if !options.targets.is_empty() || !request.external.is_empty() || options.allocator.is_some() {
        Some("memory is given for tensors")
    } else if options.handover == Handover::Mapped {
        Some("mapped tensors are asked for")
    } else if options.in_place == Preference::Required {
        Some("reads in place are asked for")
    } else if options.direct_storage == Preference::Required {
        Some("direct storage is asked for; a rank reads for others, by way of the host")
    } else if options.checksums {
        Some("checksums are asked for")
    } else {
        None
    };
    match obstacle {
        Some(obstacle) => Err(Error::bad_request(format!("the reading cannot be shared: {obstacle}"))),
        None => Ok(()),
    }
}

fn load(
    model: &Inner,
    options: &LoadOptions,
    ranks: &[Assembly],
    exchange: &dyn Exchange,
) -> Result<SharedLoaded> {
    let start = Instant::now();
    let (rank, size, id) = (exchange.rank(), exchange.size(), options.request.device);
    if ranks.len() != size as usize {
        let what = format!("{} assemblies are given for {size} ranks; give one for each", ranks.len());
        return Err(Error::bad_request(what));
    }
    let share = plan(model, options, ranks)?;
    let device = devices::open(id)?;
    let promised = *share.promised(rank);
    check_free(&*device, promised.device_bytes())?;
    quantized::check_group_indices(model, share.operations(rank))?;
    agree(exchange, model, &share)?;

    let mut probed = Probed::new(model, options);
    let temperatures = Temperatures::new(model, share.plan(), &probed);
    let mut fallbacks = std::mem::take(&mut probed.fallbacks);
    if options.direct_storage == Preference::Preferred {
        let what = "storage is read by way of the host instead of straight into the device";
        fallbacks.push(Fallback::new(what, "a rank that shares its reading reads for others"));
    }
    fallbacks.extend(parallel::fallbacks(share.plan()));
    fallbacks.extend(over_read::fallbacks(share.plan()));
    if options.dequantization.is_some() {
        fallbacks.extend(quantized::warnings(model)?);
    }
    let staged = share.plan().staged();
    let layout = staging_layout(options, 1)?.at_most(staged.reads).for_reads_of(staged.read_len_bytes_max);
    let near = device.near();
    let mut ring = devices::ring(id, layout, &near)?;
    let pinned = match devices::pin(&*device, &ring)? {
        Some(pinned) => pinned,
        None => {
            drop(ring); // Before the other is taken: the budget is for one.
            ring = devices::drivers_own_ring(&*device, layout)?;
            ring.pinned().expect("memory of the driver's own is pinned")
        }
    };
    if promised.operations > 0 {
        device.prepare(OperationKind::Dequantize)?;
    }
    let memory = Memory::allocate(&share, rank, options, &*device)?;
    let cancel = Cancel::new();
    cancel.closes(&ring);
    let (assignment, near) = (Assignment::of_reader(id, share.plan()), [near]);
    let reading = Reading {
        model,
        options,
        plan: share.plan(),
        temperatures: &temperatures,
        assignment: &assignment,
        near: &near,
    };
    let mut lanes = reading.lanes(&[Some(ring.clone())], Vec::new(), &mut fallbacks)?;
    let own: HashSet<u32> = share.reads(rank).collect();
    lanes.iter_mut().for_each(|lane| lane.reads.retain(|read| own.contains(read)));
    lanes.retain(|lane| !lane.reads.is_empty());

    let rounds = Rounds { model, share: &share, exchange, device: &device, memory: &memory, pinned: &pinned };
    let counts = rounds.run(&lanes, &temperatures.access, &ring, &cancel, options)?;
    model.check_unchanged(share.plan().reads().iter().map(|read| read.extent.file))?;

    let tensors = tensors(model, &share, rank, &memory, id);
    let told = device.fallbacks().into_iter().chain(exchange.fallbacks());
    fallbacks.extend(told.map(|(what, why)| Fallback::new(what, why)));
    fallbacks.extend(devices::placement_fallback(id, &ring));
    let mut engines: Vec<_> = lanes.iter().map(|lane| lane.engine.name()).collect();
    engines.dedup();
    let seconds = start.elapsed().as_secs_f64();
    let report = SharedReport {
        rank,
        size,
        bytes: promised.payload_bytes,
        tensors: tensors.len() as u64,
        seconds,
        gb_per_s: promised.payload_bytes as f64 / seconds.max(f64::MIN_POSITIVE) / 1e9,
        device: id.to_string(),
        engine: if engines.is_empty() { "none".to_owned() } else { engines.join("+") },
        exchange: exchange.name(),
        read_bytes: counts.read_bytes,
        read_bytes_of_all: share.plan().promised().read_bytes,
        sent_bytes: counts.sent_bytes,
        received_bytes: counts.received_bytes,
        rounds: share.round_count() as u64,
        exchange_bytes: memory.exchange_bytes(),
        carrier_bytes: promised.carrier_bytes,
        operations: counts.operations,
        transient_bytes: promised.transient_bytes,
        peak_staging_bytes: ring.peak_bytes(),
        requests: counts.engines.requests,
        promised,
        fallbacks,
    };
    cancel.lets_go(); // A cancellation from now on is not of this ring's load.
    devices::keep(&*device, ring);
    Ok(SharedLoaded { tensors, report })
}

/// Refuses a share that promises more than the device has free, before anything is allocated.
fn check_free(device: &dyn Device, needed_bytes: u64) -> Result<()> {
    if device.id() == DeviceId::Host || needed_bytes <= device.memory()?.free_bytes {
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

fn tensors(model: &Inner, share: &Share, rank: u32, memory: &Memory, device: DeviceId) -> Tensors {
    let entries = share.tensors(rank).map(|(name, placed)| {
        let arena = memory.arenas[placed.place.arena as usize].as_ref();
        let arena = arena.expect("a rank's tensors are in its own arenas");
        let storage = Storage::Arena(device, Arc::clone(arena));
        let (shape, offset_bytes) = (share.plan().shape(placed), placed.place.offset_bytes);
        let tensor = Tensor::new(placed.dtype, shape, storage, offset_bytes, placed.len_bytes);
        Entry::new(Ready { id: placed.id, name, is_renamed: true, tensor })
    });
    Tensors::new(Arc::clone(&model.checkpoint), entries.collect())
}

/// Makes sure that all ranks are about to do the same, and says which does not, and in what it differs.
fn agree(exchange: &dyn Exchange, model: &Inner, share: &Share) -> Result<()> {
    let version = fingerprint(format_args!("{}", env!("CARGO_PKG_VERSION")));
    agree_on(exchange, version, "runs another version of tensorhaul")?;
    let files = fingerprint(format_args!("{}", Headers(model)));
    agree_on(exchange, files, "loads other files")?;
    let machine = fingerprint(format_args!("{:?}", share.plan().machine()));
    agree_on(exchange, machine, "has staging memory of another size")?;
    let all = fingerprint(format_args!("{}\n{share}", share.plan()));
    agree_on(exchange, all, "loads other tensors, or otherwise")
}

fn agree_on(exchange: &dyn Exchange, fingerprint: u64, what: &str) -> Result<()> {
    match exchange.agree(fingerprint) {
        Err(ExchangeError::Disagree { peer }) => {
            let what = format!(
                "rank {peer} of the node {what} than rank 0: give all ranks the same files, tensors and options"
            );
            Err(Error::bad_request(what))
        }
        agreed => Ok(agreed?),
    }
}

/// What the files' headers say.
struct Headers<'m>(&'m Inner);

impl fmt::Display for Headers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for tensor in self.0.checkpoint.tensors() {
            let info = tensor.info;
            writeln!(f, "{} {} {:?} {}", info.name, info.dtype, info.shape, tensor.file_offset_bytes)?;
        }
        Ok(())
    }
}

/// Returns a number that is the same for the same text.
fn fingerprint(text: fmt::Arguments<'_>) -> u64 {
    struct Hash(Xxh3);

    impl Write for Hash {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0.update(text.as_bytes());
            Ok(())
        }
    }

    let mut hash = Hash(Xxh3::new());
    hash.write_fmt(text).expect("hashing does not fail");
    hash.0.digest()
}

impl From<ShareError> for Error {
    fn from(error: ShareError) -> Error {
        match error {
            ShareError::Plan(error) => error.into(),
            _ => Error::new(ErrorKind::BadRequest, error),
        }
    }
}

impl From<ExchangeError> for Error {
    fn from(error: ExchangeError) -> Error {
        let kind = match error {
            ExchangeError::Library { .. } | ExchangeError::TooOld { .. } | ExchangeError::Call { .. } => {
                ErrorKind::Device
            }
            ExchangeError::Device(error) => return error.into(),
            ExchangeError::Disagree { .. } | ExchangeError::Stranger { .. } => ErrorKind::BadRequest,
            _ => ErrorKind::Io,
        };
        Error::new(kind, error)
    }
}

impl From<LaunchError> for Error {
    fn from(error: LaunchError) -> Error {
        Error::new(ErrorKind::BadRequest, error)
    }
}

/// The strictest alignment of direct reads that the probe accepts; covers of it suit every file.
const DIRECT_ALIGN_BYTES: u64 = 4096;
