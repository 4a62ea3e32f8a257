//! Which rank of a node reads what, and what it hands to the others.
//!
//! Ranks of one node that load parts of one checkpoint need, together, each byte once. A [`Share`] is planned from the assemblies of
//! all of them, the same on every rank: each reads a run of the plan's reads, in **rounds** of at most one staging buffer, and each
//! round ends with one exchange. What a rank reads for others it packs, without gaps, into an exchange buffer on its device; what
//! several need lies there once. Long dense messages land where they belong, the others in a buffer from which they are taken apart.

mod pack;
mod text;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use crate::assembly::{Assembled, Assembly, Source};
use crate::checkpoint::Checkpoint;
use crate::in_place::InPlace;
use crate::machine::Machine;
use crate::placement::{Arena, DeviceId, Place};
use crate::plan::{Copy, PlacedTensor, Plan, PlanError, Read};
use crate::request::Request;

/// What every rank of a node reads, sends and receives: data, the same on all of them.
///
/// A number of a rank is its place on the node, from 0. The plan within stands for all ranks at once; in it
/// [`Share::stand_in`] is the device of each.
#[derive(Clone, Debug)]
pub struct Share {
    plan: Plan,
    /// By rank.
    reads: Vec<Range<u32>>,
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
}

impl SharePromised {
    /// Returns the device memory for the exchange, which is free again when the load is over.
    pub fn exchange_bytes(&self) -> u64 {
        SEND_BUFFER_COUNT * self.send_buffer_bytes + self.receive_buffer_bytes
    }
}

impl Share {
    /// Plans what the ranks of a node read together; `assemblies` has one for each, whose devices do not matter.
    ///
    /// `machine` must be the same on all ranks. Reads land in staging buffers whatever it says, because a rank reads for others.
    ///
    /// # Errors
    /// [`ShareError`] when there is no rank, a part is made by dequantization, or an assembly cannot be planned.
    ///
    /// # Panics
    /// As [`Plan::new`].
    pub fn new(
        checkpoint: &Arc<Checkpoint>,
        assemblies: &[Assembly],
        over_read_max: f64,
        machine: &Machine,
    ) -> Result<Share, ShareError> {
        let size = assemblies.len();
        if size == 0 || size > RANK_COUNT_MAX {
            return Err(ShareError::RankCount { size });
        }
        let mut request = Request::all();
        request.assembly = Some(Arc::new(together(assemblies)?));
        request.over_read_max = over_read_max;
        let machine = Machine { in_place: InPlace::never(), peers: Vec::new(), ..machine.clone() };
        let plan = Plan::new(checkpoint, &request, &machine)?;
        let reads = hand_out(&plan, size);
        let turns: Vec<_> = reads.iter().map(|reads| turns(&plan, reads)).collect();
        let round_count = turns.iter().map(Vec::len).max().unwrap_or(0);
        let of_round = |round: usize| {
            let reads = turns.iter().map(|turns| turns.get(round).cloned().unwrap_or(0..0));
            pack::round(&plan, reads.collect())
        };
        let rounds: Vec<_> = (0..round_count).map(of_round).collect();
        let promised = (0..size as u32).map(|rank| promise(&plan, &reads, &rounds, rank)).collect();
        Ok(Share { plan, reads, rounds, promised })
    }

    /// Returns the number of ranks.
    pub fn size(&self) -> u32 {
        self.reads.len() as u32
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
    pub fn reads(&self, rank: u32) -> Range<u32> {
        self.reads[rank as usize].clone()
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

    /// Returns the allocations that a rank's tensors live in, with their places in [`Plan::arenas`].
    pub fn arenas(&self, rank: u32) -> impl Iterator<Item = (u32, &Arena)> {
        let numbered = (0..).zip(self.plan.arenas());
        numbered.filter(move |(_, arena)| arena.device == Share::stand_in(rank))
    }

    /// Returns what the share promises to cost a rank.
    pub fn promised(&self, rank: u32) -> &SharePromised {
        &self.promised[rank as usize]
    }
}

/// Joins the assemblies: names become distinct, and each rank has a device.
fn together(assemblies: &[Assembly]) -> Result<Assembly, ShareError> {
    let mut tensors = Vec::with_capacity(assemblies.iter().map(|assembly| assembly.tensors.len()).sum());
    for (rank, assembly) in (0..).zip(assemblies) {
        for tensor in &assembly.tensors {
            if tensor.parts.iter().any(|part| matches!(part.source, Source::Made(_))) {
                return Err(ShareError::Made { name: tensor.name.clone() });
            }
            let name = format!("rank{rank}{RANK_END}{}", tensor.name);
            tensors.push(Assembled { name, device: Share::stand_in(rank), ..tensor.clone() });
        }
    }
    // Ranks of one model are of one partition.
    let unfused = assemblies.first().map_or(Vec::new(), |assembly| assembly.unfused.clone());
    Ok(Assembly { tensors, padding: Vec::new(), unfused })
}

/// Returns a name without the rank that [`together`] put before it.
fn own_name(name: &str) -> &str {
    name.split_once(RANK_END).map_or(name, |(_, name)| name)
}

fn rank_of(plan: &Plan, copy: &Copy) -> u32 {
    match plan.arenas()[copy.target.arena as usize].device {
        DeviceId::Cuda(rank) => rank,
        _ => unreachable!("every tensor of a share is on the device that stands for its rank"),
    }
}

/// Gives each rank a run of the reads: the one in whose equal part of all bytes a read's middle lies. So a run is at most one read
/// longer or shorter than the others' mean.
fn hand_out(plan: &Plan, size: usize) -> Vec<Range<u32>> {
    let total_bytes = u128::from(plan.promised().read_bytes);
    let mut runs = vec![0..0; size];
    let (mut before_bytes, mut rank) = (0, 0);
    for (number, read) in (0..).zip(plan.reads()) {
        let len_bytes = u128::from(read.len_bytes());
        let its = ((2 * before_bytes + len_bytes) * size as u128 / (2 * total_bytes)) as usize;
        if its > rank {
            runs[rank + 1..=its].fill(number..number);
            rank = its;
        }
        runs[rank].end = number + 1;
        before_bytes += len_bytes;
    }
    let end = plan.reads().len() as u32;
    runs[rank + 1..].fill(end..end);
    runs
}

/// Cuts a rank's run into rounds of at most a staging buffer's bytes. A round and the next have staging buffers for all of their
/// reads, so that no read waits for a buffer that a later one holds.
fn turns(plan: &Plan, reads: &Range<u32>) -> Vec<Range<u32>> {
    let Machine { buffer_len_bytes, buffer_count, .. } = *plan.machine();
    let reads_max = (buffer_count / 2).max(1);
    let mut turns: Vec<Range<u32>> = Vec::new();
    let mut round_bytes = 0;
    for number in reads.clone() {
        let len_bytes = plan.reads()[number as usize].len_bytes();
        match turns.last_mut() {
            Some(turn) if round_bytes + len_bytes <= buffer_len_bytes && (turn.len() as u32) < reads_max => {
                turn.end += 1;
                round_bytes += len_bytes;
            }
            _ => {
                turns.push(number..number + 1);
                round_bytes = len_bytes;
            }
        }
    }
    turns
}

fn promise(plan: &Plan, reads: &[Range<u32>], rounds: &[Vec<Turn>], rank: u32) -> SharePromised {
    let device = Share::stand_in(rank);
    let own = plan.tensors().iter().filter(|tensor| plan.device(tensor) == device);
    let run = reads[rank as usize].clone();
    let mut promised = SharePromised {
        payload_bytes: own.map(|tensor| tensor.len_bytes).sum(),
        read_bytes: plan.reads()[run.start as usize..run.end as usize].iter().map(Read::len_bytes).sum(),
        reads: run.len() as u64,
        target_bytes: plan
            .arenas()
            .iter()
            .filter(|arena| arena.device == device)
            .map(|arena| arena.len_bytes)
            .sum(),
        ..SharePromised::default()
    };
    for turn in rounds.iter().map(|turns| &turns[rank as usize]) {
        promised.sent_bytes += turn.sends.iter().map(|send| send.len_bytes).sum::<u64>();
        promised.received_bytes += turn.receives.iter().map(|receive| receive.len_bytes).sum::<u64>();
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
    /// A tensor that is made by dequantization.
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
            ShareError::Made { name } => {
                write!(
                    f,
                    "tensor {name:?} is to be dequantized, which ranks that share their reading do not do; load it packed, or \
                     without sharing"
                )
            }
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
