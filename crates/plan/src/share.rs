//! Which rank of a node reads what, and what it hands to the others.
//!
//! Ranks of one node that load parts of one checkpoint need, together, each byte once. A [`Share`] is planned from the assemblies of
//! all of them, the same on every rank: each does some of the plan's reads, in **rounds** of at most one staging buffer, and each
//! round ends with one exchange. What a rank reads for others it packs, without gaps, into an exchange buffer on its device; what
//! several need lies there once. Long dense messages land where they belong, the others in a buffer from which they are taken apart.
//!
//! Quantized tensors are exchanged as they are stored: each rank makes its own part of the numbers, when the round is over that brings
//! the last of its sources.

mod deal;
mod pack;
mod text;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use crate::assembly::{Assembled, Assembly, Padding, Source};
use crate::checkpoint::Checkpoint;
use crate::in_place::InPlace;
use crate::machine::Machine;
use crate::placement::{Arena, DeviceId, Place};
use crate::plan::{Copy, Operation, PlacedTensor, Plan, PlanError};
use crate::request::{Request, Select};
use deal::Progress;

/// What every rank of a node reads, sends and receives: data, the same on all of them.
///
/// A number of a rank is its place on the node, from 0. The plan within stands for all ranks at once; in it
/// [`Share::stand_in`] is the device of each.
#[derive(Clone, Debug)]
pub struct Share {
    plan: Plan,
    /// What of all ranks' assemblies is planned.
    assembly: Arc<Assembly>,
    /// By round, then by rank.
    rounds: Vec<Vec<Turn>>,
    /// By rank.
    promised: Vec<SharePromised>,
}

/// What one rank does in one round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Turn {
    /// The reads of the plan that it does, together at most one staging buffer long.
    pub reads: Range<u32>,
    /// What of them it packs for others, ascending and without gaps.
    pub packed: Vec<Packed>,
    /// What it sends, in this order for each peer.
    pub sends: Vec<Send>,
    /// What it receives, in this order from each peer.
    pub receives: Vec<Receive>,
    /// What it takes out of its receive buffer afterwards.
    pub unpacked: Vec<Copy>,
    /// Operations of its own that have all of their sources then, by their places in [`Plan::operations`], ascending.
    pub operations: Vec<u32>,
    /// The round whose operations have to be over before what it reads for itself lands: their sources lay in the same place. An
    /// earlier one.
    pub after: Option<u32>,
}

/// A piece of a read, or equal pieces at equal distances, that is packed into the send buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Packed {
    /// Number of the read in the plan.
    pub read: u32,
    /// Distance from the first byte of the read.
    pub source_offset_bytes: u64,
    /// Number of bytes of each piece.
    pub piece_len_bytes: u64,
    /// Number of pieces; 1 or more.
    pub piece_count: u64,
    /// From a piece to the next in the read; 0 for one piece.
    pub source_stride_bytes: u64,
    /// Where the first lies in the send buffer; the others follow without gaps.
    pub offset_bytes: u64,
}

impl Packed {
    /// Returns the bytes it takes in the send buffer.
    pub fn len_bytes(&self) -> u64 {
        self.piece_len_bytes * self.piece_count
    }
}

/// A range of the send buffer that goes to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Send {
    /// Who gets it.
    pub peer: u32,
    /// Where it begins in the send buffer.
    pub offset_bytes: u64,
    /// Its bytes.
    pub len_bytes: u64,
}

/// What comes from a peer, and where it lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Receive {
    /// Who sends it.
    pub peer: u32,
    /// Its bytes.
    pub len_bytes: u64,
    /// Where its first byte lands; the others follow without gaps.
    pub landing: Landing,
}

/// Where a message lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Landing {
    /// Where it belongs.
    InPlace(Place),
    /// In the receive buffer, this far from its start.
    Buffered(u64),
}

/// What a share promises to cost a rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SharePromised {
    /// Bytes of the tensors it ends with.
    pub payload_bytes: u64,
    /// Bytes it asks of storage.
    pub read_bytes: u64,
    /// Number of reads.
    pub reads: u64,
    /// Bytes it sends, counted for each peer.
    pub sent_bytes: u64,
    /// Bytes it receives.
    pub received_bytes: u64,
    /// Longest of its send buffers; there are [`SEND_BUFFER_COUNT`].
    pub send_buffer_bytes: u64,
    /// Length of its receive buffer.
    pub receive_buffer_bytes: u64,
    /// Memory of its result, rounding included.
    pub target_bytes: u64,
    /// Tensors, or parts of them, that it dequantizes.
    pub operations: u64,
    /// Device memory for sources of operations, which is free again when the load is over.
    pub transient_bytes: u64,
    /// Host memory for the messages of its longest round, both ways: what a carrier takes that stops there. Links take none.
    pub carrier_bytes: u64,
}

impl SharePromised {
    /// Returns the device memory for the exchange, which is free again when the load is over.
    pub fn exchange_bytes(&self) -> u64 {
        SEND_BUFFER_COUNT * self.send_buffer_bytes + self.receive_buffer_bytes
    }

    /// Returns all device memory that the load takes: its result, the exchange, and sources of operations.
    pub fn device_bytes(&self) -> u64 {
        self.target_bytes + self.exchange_bytes() + self.transient_bytes
    }
}

impl Share {
    /// Plans what the ranks of a node read together; `assemblies` has one for each, whose devices do not matter.
    ///
    /// Of the request count what is selected, by the names of the ranks' tensors, the over-read, and what is dequantized through how much
    /// transient memory. `machine` must be the same on all ranks. Reads land in staging buffers whatever it says, because a rank
    /// reads for others.
    ///
    /// # Errors
    /// [`ShareError`] when there is no rank, or too many, when parts are of dequantized tensors and the request dequantizes none, and when an
    /// assembly cannot be planned.
    ///
    /// # Panics
    /// As [`Plan::new`].
    pub fn new(
        checkpoint: &Arc<Checkpoint>,
        assemblies: &[Assembly],
        request: &Request,
        machine: &Machine,
    ) -> Result<Share, ShareError> {
        let size = assemblies.len();
        if size == 0 || size > RANK_COUNT_MAX {
            return Err(ShareError::RankCount { size });
        }
        if request.dequantize.is_none()
            && let Some(tensor) =
                assemblies.iter().flat_map(|ranks| &ranks.tensors).find(|tensor| is_made(tensor))
        {
            return Err(ShareError::Made { name: tensor.name.clone() });
        }
        let assembly = Arc::new(together(checkpoint, assemblies, request)?);
        let mut of_all = Request::of(Select::All);
        of_all.assembly = Some(Arc::clone(&assembly));
        of_all.over_read_max = request.over_read_max;
        of_all.dequantize = request.dequantize.clone();
        of_all.transient_bytes_max = request.transient_bytes_max;
        let machine = Machine { in_place: InPlace::never(), peers: Vec::new(), ..machine.clone() };
        let plan = Plan::new(checkpoint, &of_all, &machine)?;
        let rounds = rounds(&plan, size);
        let promised = (0..size as u32).map(|rank| promise(&plan, &rounds, rank)).collect();
        Ok(Share { plan, assembly, rounds, promised })
    }

    /// Returns the number of ranks.
    pub fn size(&self) -> u32 {
        self.promised.len() as u32
    }

    /// Returns the plan of all ranks at once: the places of their tensors, the reads, and what is copied out of each.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns what stands for a rank's device in the plan, whatever its device is.
    pub fn stand_in(rank: u32) -> DeviceId {
        DeviceId::Cuda(rank)
    }

    /// Returns the number of rounds.
    pub fn round_count(&self) -> usize {
        self.rounds.len()
    }

    /// Returns what each rank does in a round, by rank.
    pub fn round(&self, round: usize) -> &[Turn] {
        &self.rounds[round]
    }

    /// Returns the reads that a rank does, in its order.
    pub fn reads(&self, rank: u32) -> impl Iterator<Item = u32> {
        self.rounds.iter().flat_map(move |turns| turns[rank as usize].reads.clone())
    }

    /// Returns the copies out of a read whose bytes are for this rank itself.
    pub fn own_copies(&self, rank: u32, read: u32) -> impl Iterator<Item = &Copy> {
        let copies = self.plan.copies(&self.plan.reads()[read as usize]);
        copies.iter().filter(move |copy| rank_of(&self.plan, copy) == rank)
    }

    /// Returns the tensors that a rank ends with, each with its name there.
    pub fn tensors(&self, rank: u32) -> impl Iterator<Item = (&str, &PlacedTensor)> {
        let own = self.plan.tensors().iter();
        let own = own.filter(move |tensor| self.plan.device(tensor) == Share::stand_in(rank));
        own.map(|tensor| (own_name(self.plan.name(tensor)), tensor))
    }

    /// Returns the rows that tensors of a rank have behind their end where they are used, each with the tensor's name there. They are in no
    /// file, and no load writes them.
    pub fn padding(&self, rank: u32) -> impl Iterator<Item = (&str, u64)> {
        let padded = |padding: &Padding| (&self.assembly.tensors[padding.tensor as usize], padding.rows);
        let padded = self.assembly.padding.iter().map(padded);
        let own = padded.filter(move |(tensor, _)| tensor.device == Share::stand_in(rank));
        own.map(|(tensor, rows)| (own_name(&tensor.name), rows))
    }

    /// Returns the allocations that a rank's tensors live in, with their places in [`Plan::arenas`].
    pub fn arenas(&self, rank: u32) -> impl Iterator<Item = (u32, &Arena)> {
        let numbered = (0..).zip(self.plan.arenas());
        numbered.filter(move |(_, arena)| arena.device == Share::stand_in(rank))
    }

    /// Returns what a rank dequantizes, in its order.
    pub fn operations(&self, rank: u32) -> impl Iterator<Item = &Operation> {
        let ready = self.rounds.iter().flat_map(move |turns| &turns[rank as usize].operations);
        ready.map(|operation| &self.plan.operations()[*operation as usize])
    }

    /// Returns what the share promises to cost a rank.
    pub fn promised(&self, rank: u32) -> &SharePromised {
        &self.promised[rank as usize]
    }
}

fn is_made(tensor: &Assembled) -> bool {
    tensor.parts.iter().any(|part| matches!(part.source, Source::Made(_)))
}

/// Joins what is selected of the assemblies: names become distinct, and each rank has a device.
fn together(
    checkpoint: &Checkpoint,
    assemblies: &[Assembly],
    request: &Request,
) -> Result<Assembly, ShareError> {
    let of_rank = |(rank, assembly): (u32, &Assembly)| {
        let on_stand_in = |tensor: &Assembled| Assembled { device: Share::stand_in(rank), ..tensor.clone() };
        assembly.tensors.iter().map(on_stand_in).collect::<Vec<_>>()
    };
    let tensors = (0..).zip(assemblies).flat_map(of_rank).collect();
    let all = Assembly { tensors, ..Assembly::default() };
    let kept = all.selected(checkpoint, request)?;
    let padding = padding_of(assemblies, &kept);
    let mut tensors: Vec<_> = kept.into_iter().map(|place| all.tensors[place].clone()).collect();
    for tensor in &mut tensors {
        tensor.name = format!("rank{}{RANK_END}{}", rank_of_device(tensor.device), tensor.name);
    }
    // Ranks of one model are of one partition.
    let (unfused, unused_rules) = assemblies
        .first()
        .map_or_else(Default::default, |assembly| (assembly.unfused.clone(), assembly.unused_rules.clone()));
    Ok(Assembly { tensors, padding, unfused, unused_rules })
}

/// Returns the padding of the tensors that are kept, by their places behind one another.
fn padding_of(assemblies: &[Assembly], kept: &[usize]) -> Vec<Padding> {
    let mut rows = BTreeMap::new();
    let mut before = 0;
    for assembly in assemblies {
        let padding = assembly.padding.iter();
        rows.extend(padding.map(|padding| (before + padding.tensor as usize, padding.rows)));
        before += assembly.tensors.len();
    }
    let of_kept =
        |(tensor, place): (u32, &usize)| rows.get(place).map(|rows| Padding { tensor, rows: *rows });
    (0..).zip(kept).filter_map(of_kept).collect()
}

/// Returns a name without the rank that [`together`] put before it.
fn own_name(name: &str) -> &str {
    name.split_once(RANK_END).map_or(name, |(_, name)| name)
}

fn rank_of(plan: &Plan, copy: &Copy) -> u32 {
    rank_of_device(plan.arenas()[copy.target.arena as usize].device)
}

fn rank_of_operation(plan: &Plan, operation: &Operation) -> u32 {
    rank_of_device(plan.arenas()[operation.place.arena as usize].device)
}

fn rank_of_device(device: DeviceId) -> u32 {
    match device {
        DeviceId::Cuda(rank) => rank,
        _ => unreachable!("every tensor of a share is on the device that stands for its rank"),
    }
}

/// Works out every round: who reads what, what is exchanged, and what can be dequantized then.
fn rounds(plan: &Plan, size: usize) -> Vec<Vec<Turn>> {
    let dealt = deal::deal(plan, size);
    let mut rounds: Vec<_> = dealt.into_iter().map(|reads| pack::round(plan, reads)).collect();
    let mut progress = Progress::new(plan);
    for (number, turns) in rounds.iter_mut().enumerate() {
        for rank in 0..turns.len() {
            let reads = turns[rank].reads.clone();
            let waits = reads.clone().flat_map(|read| plan.reads()[read as usize].after.clone());
            let operation = |operation: u32| &plan.operations()[operation as usize];
            let own = waits.filter(|waits| rank_of_operation(plan, operation(*waits)) == rank as u32);
            turns[rank].after =
                own.filter_map(|waits| progress.ready_in(waits)).max().map(|round| round as u32);
            for ready in reads.flat_map(|read| progress.done(read, number)).collect::<Vec<_>>() {
                turns[rank_of_operation(plan, operation(ready)) as usize].operations.push(ready);
            }
        }
        turns.iter_mut().for_each(|turn| turn.operations.sort_unstable());
    }
    rounds
}

fn promise(plan: &Plan, rounds: &[Vec<Turn>], rank: u32) -> SharePromised {
    let device = Share::stand_in(rank);
    let own = plan.tensors().iter().filter(|tensor| plan.device(tensor) == device);
    let arenas = |is_scratch| {
        let own = move |arena: &&Arena| arena.device == device && arena.is_scratch == is_scratch;
        plan.arenas().iter().filter(own).map(|arena| arena.len_bytes).sum()
    };
    let mut promised = SharePromised {
        payload_bytes: own.map(|tensor| tensor.len_bytes).sum(),
        target_bytes: arenas(false),
        transient_bytes: arenas(true),
        ..SharePromised::default()
    };
    for turn in rounds.iter().map(|turns| &turns[rank as usize]) {
        let reads = turn.reads.clone().map(|read| plan.reads()[read as usize].len_bytes());
        promised.reads += turn.reads.len() as u64;
        promised.read_bytes += reads.sum::<u64>();
        promised.operations += turn.operations.len() as u64;
        let sent_bytes: u64 = turn.sends.iter().map(|send| send.len_bytes).sum();
        let received_bytes: u64 = turn.receives.iter().map(|receive| receive.len_bytes).sum();
        promised.sent_bytes += sent_bytes;
        promised.received_bytes += received_bytes;
        promised.carrier_bytes = promised.carrier_bytes.max(sent_bytes + received_bytes);
        let send_end = turn.packed.last().map_or(0, |packed| packed.offset_bytes + packed.len_bytes());
        let receive_end = turn.receives.iter().filter_map(|receive| match receive.landing {
            Landing::Buffered(offset_bytes) => Some(offset_bytes + receive.len_bytes),
            Landing::InPlace(_) => None,
        });
        promised.send_buffer_bytes = promised.send_buffer_bytes.max(send_end);
        promised.receive_buffer_bytes = promised.receive_buffer_bytes.max(receive_end.max().unwrap_or(0));
    }
    promised
}

/// Why ranks cannot share their reading.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShareError {
    /// No rank, or more than a node has.
    RankCount {
        /// How many.
        size: usize,
    },
    /// A tensor with parts of dequantized ones, where the request dequantizes none.
    Made {
        /// The tensor.
        name: String,
    },
    /// The ranks' loads cannot be planned.
    Plan(PlanError),
}

impl From<PlanError> for ShareError {
    fn from(error: PlanError) -> ShareError {
        ShareError::Plan(error)
    }
}

impl fmt::Display for ShareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ShareError::RankCount { size } => {
                write!(f, "{size} ranks cannot share their reading; 1 to {RANK_COUNT_MAX} of one node can")
            }
            ShareError::Made { name } => write!(
                f,
                "tensor {name:?} is made of dequantized ones, and nothing is to be dequantized; load with the options that the \
                 assemblies were made with"
            ),
            ShareError::Plan(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ShareError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ShareError::Plan(error) => error.source(),
            _ => None,
        }
    }
}

/// One that is being sent while the next is filled.
pub const SEND_BUFFER_COUNT: u64 = 2;

/// More processes than any node has devices.
const RANK_COUNT_MAX: usize = 1024;

/// Ends the rank before a tensor's name. The part before it is no number, so that lifetime groups are as they were.
const RANK_END: char = '/';
