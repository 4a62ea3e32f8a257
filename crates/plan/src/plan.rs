//! The plan: what is read, where each byte lands, and what that costs.

mod error;
mod operation;
mod promised;
mod read;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::assembly::Unfused;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::dtype::Dtype;
use crate::machine::Machine;
use crate::placement::{Arena, DeviceId, Place};
use crate::request::Request;
use crate::schedule;
pub use error::PlanError;
pub use operation::{Operation, Source};
pub(crate) use promised::Vain;
pub use promised::{OverRead, OverReadReason, OverReadSum, Promised, Staged};
pub use read::{Brought, Copy, Read, Steps, Target};

/// An immutable transfer schedule: prints as text, serializes as JSON, and is obeyed to the byte.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) tensors: Vec<PlacedTensor>,
    pub(crate) arenas: Vec<Arena>,
    pub(crate) operations: Vec<Operation>,
    pub(crate) reads: Vec<Read>,
    pub(crate) copies: Vec<Copy>,
    pub(crate) brought: Vec<Brought>,
    pub(crate) names: Vec<String>,
    pub(crate) dims: Vec<u64>,
    /// What is read in vain beyond the bound, the worst first, and the same with names, which few ask for.
    pub(crate) vain: Vec<Vain>,
    pub(crate) over_reads: OnceLock<Vec<OverRead>>,
    pub(crate) unfused: Vec<Unfused>,
    pub(crate) unused_rules: Vec<String>,
    pub(crate) machine: Machine,
    pub(crate) promised: Promised,
}

impl Plan {
    /// Plans a request for a machine.
    ///
    /// # Errors
    /// [`PlanError`] when the request names what is not there, a slice leaves its tensor, or the
    /// result would pass `target_bytes_max`.
    ///
    /// # Panics
    /// When `machine.buffer_len_bytes` or the longest read of a route is 0 or no multiple of 4096, `machine.buffer_count` is 0, or
    /// `machine.direct_align_bytes` is no power of two up to 4096.
    pub fn new(
        checkpoint: &Arc<Checkpoint>,
        request: &Request,
        machine: &Machine,
    ) -> Result<Plan, PlanError> {
        schedule::plan(checkpoint, request, machine)
    }

    /// Returns the checkpoint the plan reads.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// Returns the tensors of the result, in table order.
    pub fn tensors(&self) -> &[PlacedTensor] {
        &self.tensors
    }

    /// Returns the name of a tensor of the result.
    pub fn name<'p>(&'p self, tensor: &PlacedTensor) -> &'p str {
        match tensor.name {
            Some(name) => &self.names[name as usize],
            None => self.checkpoint.tensor(tensor.id).info.name,
        }
    }

    /// Returns the shape of a tensor of the result: the part's, where a part was asked for.
    pub fn shape<'p>(&'p self, tensor: &'p PlacedTensor) -> &'p [u64] {
        match &tensor.shape {
            Some(shape) => &self.dims[shape.clone()],
            None => self.checkpoint.tensor(tensor.id).info.shape,
        }
    }

    /// Returns where a tensor of the result is handed over.
    pub fn device(&self, tensor: &PlacedTensor) -> DeviceId {
        self.arenas[tensor.place.arena as usize].device
    }

    /// Returns the devices that tensors are handed over on, ascending; the host's alone for a result without tensors.
    pub fn devices(&self) -> Vec<DeviceId> {
        let mut devices: Vec<_> = self.arenas.iter().map(|arena| arena.device).collect();
        devices.sort_unstable();
        devices.dedup();
        devices
    }

    /// Returns the operations, in the order in which their sources arrive.
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }

    /// Returns the allocations the result lives in.
    pub fn arenas(&self) -> &[Arena] {
        &self.arenas
    }

    /// Returns the reads in schedule order: files in order, offsets in order within each. Of operations, small sources come
    /// first of all, and the others together where the payload stands.
    pub fn reads(&self) -> &[Read] {
        &self.reads
    }

    /// Returns the copies of a staged read; none for a read in place.
    pub fn copies(&self, read: &Read) -> &[Copy] {
        match &read.target {
            Target::Staged { copies } => &self.copies[copies.start as usize..copies.end as usize],
            Target::InPlace(_) => &[],
        }
    }

    /// Returns what a read brings bytes of: tensors, and operations whose sources they are, each once.
    pub fn brought(&self, read: &Read) -> &[Brought] {
        &self.brought[read.brought.start as usize..read.brought.end as usize]
    }

    /// Counts and measures the reads that go through the staging ring, which is what the ring has to hold.
    pub fn staged(&self) -> Staged {
        let is_staged = |read: &&Read| matches!(read.target, Target::Staged { .. });
        self.reads.iter().filter(is_staged).fold(Staged::default(), |staged, read| Staged {
            reads: staged.reads + 1,
            read_len_bytes_max: staged.read_len_bytes_max.max(read.len_bytes()),
        })
    }

    /// Returns tensors for which more is read than the request allows on the whole, the worst first: as few as account for what is too
    /// much. None where the plan stays inside its bound.
    pub fn over_reads(&self) -> &[OverRead] {
        let named = |vain: &Vain| OverRead {
            name: self.checkpoint.tensor(vain.id).info.name.to_owned(),
            over_bytes: vain.over_bytes,
            reason: vain.reason,
        };
        self.over_reads.get_or_init(|| self.vain.iter().map(named).collect())
    }

    /// Returns what was to be fused and is not.
    pub fn unfused(&self) -> &[Unfused] {
        &self.unfused
    }

    /// Returns the patterns of the caller's own rules that no tensor of the model has: one may be a slip.
    pub fn unused_rules(&self) -> &[String] {
        &self.unused_rules
    }

    /// Returns the machine it was made for.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Returns what the plan promises to cost.
    pub fn promised(&self) -> &Promised {
        &self.promised
    }
}

/// One tensor of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedTensor {
    /// The stored tensor it is, is a part of, or whose codes it is made of.
    pub id: TensorId,
    /// Element type in the result.
    pub dtype: Dtype,
    /// Its name, by its place in the plan's own list; `None` where it has the stored tensor's. See [`Plan::name`].
    pub name: Option<u32>,
    /// Its shape, by its range of the plan's own dims; `None` where it has the stored tensor's. See [`Plan::shape`].
    pub shape: Option<Range<usize>>,
    /// Where its first byte lands.
    pub place: Place,
    /// Its bytes; 0 for an empty tensor.
    pub len_bytes: u64,
    /// How many reads bring bytes of it as stored.
    pub read_count: u32,
    /// How many operations make parts of it, mostly none. It is ready when all of these and all of its reads are done.
    pub operation_count: u32,
    /// The same tensor on another device, by its place in [`Plan::tensors`]: nothing is read for this one, it is copied from device to
    /// device when that one is ready.
    pub copy_of: Option<u32>,
}

impl PlacedTensor {
    /// Tells whether operations make it, or a part of it.
    pub fn is_made(&self) -> bool {
        self.operation_count > 0
    }
}
