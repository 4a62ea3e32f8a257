//! The plan: what is read, where each byte lands, and what that costs.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use crate::assembly::Unfused;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::device_map::DeviceMapError;
use crate::dtype::Dtype;
use crate::extent::{Extent, Stride};
use crate::in_place::InPlace;
use crate::placement::{Arena, DeviceId, Place};
use crate::quant::{CutError, Family, Recipe, Role};
use crate::request::Request;
use crate::schedule;
use crate::slice::SliceError;

/// What the machine brings to a plan: the staging buffers, and what storage can write straight
/// into the memory the tensors are handed over in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Length of a staging buffer, and of the largest read into one; a multiple of 4096.
    pub buffer_len_bytes: u64,
    /// Number of staging buffers.
    pub buffer_count: u32,
    /// Direct (`O_DIRECT`) reads start and end at multiples of this, a power of two up to 4096, as
    /// probed; 1 when no file can be read directly.
    pub direct_align_bytes: u64,
    /// Which reads may land in the tensors' own memory: those into host and unified memory, where a stop in the staging ring
    /// would copy every byte once more, and those that direct storage can do.
    pub in_place: InPlace,
    /// Which devices can copy to which, source first: a tensor for both is read for the first only.
    pub peers: Vec<(DeviceId, DeviceId)>,
}

impl Default for Machine {
    /// 64 buffers of 4 MiB, direct reads of whole pages, and no memory that storage can write to: an
    /// accelerator.
    fn default() -> Machine {
        Machine {
            buffer_len_bytes: 4 << 20,
            buffer_count: 64,
            direct_align_bytes: 4096,
            in_place: InPlace::never(),
            peers: Vec::new(),
        }
    }
}

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
    pub(crate) over_reads: Vec<OverRead>,
    pub(crate) unfused: Vec<Unfused>,
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

    /// Returns the tensors for which more is read than the request allows on the whole, the worst first.
    pub fn over_reads(&self) -> &[OverRead] {
        &self.over_reads
    }

    /// Returns what was to be fused and is not.
    pub fn unfused(&self) -> &[Unfused] {
        &self.unfused
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

/// What a read brings bytes of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Brought {
    /// A tensor of the result, by its place in [`Plan::tensors`].
    Tensor(u32),
    /// The sources of an operation, by its place in [`Plan::operations`].
    Operation(u32),
}

/// Dequantization of one tensor, or of a part of one, when its sources have arrived.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Operation {
    /// The name of the quantized tensor.
    pub name: String,
    /// What people call the format.
    pub family: Family,
    /// The shape of what it makes.
    pub shape: Vec<u64>,
    /// Whether the result is `[.., K, N]` instead of `[.., N, K]`.
    pub is_transposed: bool,
    /// How bytes become numbers.
    pub recipe: Recipe,
    /// Where they are.
    pub sources: Vec<Source>,
    /// The tensor it makes, or makes a part of, by its place in [`Plan::tensors`], which says of which dtype.
    pub tensor: u32,
    /// Where the first byte it makes lands; the others follow without gaps.
    pub place: Place,
    /// Bytes it makes; 0 where there is nothing to do.
    pub len_bytes: u64,
    /// How many reads bring its sources; it can begin when all of them are done.
    pub read_count: u32,
}

/// A stored tensor that an operation reads, in scratch memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Source {
    /// What it is to the operation.
    pub role: Role,
    /// Which tensor.
    pub id: TensorId,
    /// Where its first byte lies when all reads are done.
    pub place: Place,
    /// Its bytes.
    pub len_bytes: u64,
}

/// One read of one file, at most as long as a staging buffer, or as its route in place allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// The bytes read; a whole multiple of the file's direct alignment, except at its end and where only pieces of them are read.
    pub extent: Extent,
    /// The pieces of the extent that are read, where the rest is left out: they land back to back.
    pub stride: Option<Stride>,
    /// Where they land.
    pub target: Target,
    /// Range of the plan's list of tensors brought; see [`Plan::brought`].
    pub brought: Range<u32>,
    /// How many of its bytes are of tensors asked for, or of sources; the rest is alignment and bridged gaps.
    pub payload_bytes: u64,
    /// The operations that must have been started before the read begins, and be over before its bytes land: their sources lay in the
    /// same place. Mostly none.
    pub after: Range<u32>,
}

impl Read {
    /// Returns the bytes that land in memory.
    pub fn len_bytes(&self) -> u64 {
        self.stride.map_or(self.extent.len_bytes, |stride| stride.len_bytes())
    }
}

/// Where the bytes of a read land.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Straight in the arena: the first byte read lands at this place.
    InPlace(Place),
    /// In a staging buffer, from which these copies of the plan take them.
    Staged {
        /// Range of the plan's copies; see [`Plan::copies`].
        copies: Range<u32>,
    },
}

/// One copy from a staging buffer into an arena: of one piece, or of equal pieces at equal distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Copy {
    /// Distance from the first byte of the read.
    pub source_offset_bytes: u64,
    /// Where the first byte lands.
    pub target: Place,
    /// Number of bytes of each piece.
    pub len_bytes: u64,
    /// Further pieces.
    #[serde(skip_serializing_if = "Steps::is_once")]
    pub steps: Steps,
}

impl Copy {
    /// Walks the pieces: for each, where it begins in the read and in the arena.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (source, target, steps) = (self.source_offset_bytes, self.target.offset_bytes, self.steps);
        (0..steps.count).map(move |step| {
            (source + step * steps.source_stride_bytes, target + step * steps.target_stride_bytes)
        })
    }
}

/// How many pieces, and how far apart they begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Steps {
    /// Number of pieces; 1 or more.
    pub count: u64,
    /// From a piece to the next in the read.
    pub source_stride_bytes: u64,
    /// From a piece to the next in the arena.
    pub target_stride_bytes: u64,
}

impl Steps {
    /// One piece.
    pub const ONCE: Steps = Steps { count: 1, source_stride_bytes: 0, target_stride_bytes: 0 };

    /// Tells whether there is one piece only.
    pub fn is_once(&self) -> bool {
        self.count == 1
    }
}

/// A tensor of whose rows more is read than is kept, because the pieces are too short to be read apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OverRead {
    /// The stored tensor.
    pub name: String,
    /// Bytes that are read and not kept.
    pub over_bytes: u64,
    /// Length of the pieces kept.
    pub piece_len_bytes: u64,
}

/// The reads of a plan that go through the staging ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Staged {
    /// Number of reads.
    pub reads: u64,
    /// Length of the longest; at most one buffer of the machine.
    pub read_len_bytes_max: u64,
}

/// What a plan promises to cost. A run reports what it used beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Promised {
    /// Bytes of the tensors asked for.
    pub payload_bytes: u64,
    /// Bytes of the files that are needed for them: their own as stored, and sources of operations; what several take counts once.
    pub needed_bytes: u64,
    /// Bytes asked of storage: those needed, alignment and bridged gaps.
    pub read_bytes: u64,
    /// Number of reads.
    pub reads: u64,
    /// Number of copies out of staging buffers.
    pub copies: u64,
    /// Number of tensors that are dequantized.
    pub operations: u64,
    /// Bytes that land in the tensors' own memory at once.
    pub in_place_bytes: u64,
    /// The most host memory between storage and device.
    pub peak_staging_bytes: u64,
    /// Memory of the result, rounding included; the caller's own memory is not counted.
    pub target_bytes: u64,
    /// Device memory for sources of operations, which is free again when the load is over.
    pub transient_bytes: u64,
    /// The most host memory of the run: staging, and what is on the host of the result and of sources.
    pub peak_host_bytes: u64,
}

/// Why a request cannot be planned.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlanError {
    /// A name that no tensor has.
    UnknownTensor {
        /// The name asked for.
        name: String,
        /// How many tensors there are.
        tensor_count: usize,
    },
    /// A glob that matches no tensor.
    NothingMatches {
        /// The glob asked for.
        glob: String,
        /// How many tensors there are.
        tensor_count: usize,
    },
    /// Text that is not a glob.
    BadGlob {
        /// The text.
        glob: String,
        /// What is wrong with it.
        what: String,
    },
    /// Memory for a tensor that the request does not select.
    ExternalNotSelected {
        /// The tensor.
        name: String,
    },
    /// A slice of a tensor that the request does not select.
    SliceNotSelected {
        /// The tensor.
        name: String,
    },
    /// A slice with steps of a tensor that is dequantized.
    SliceOfMade {
        /// The tensor.
        name: String,
    },
    /// A slice of a tensor that an assembly puts together.
    SliceOfAssembled {
        /// The tensor.
        name: String,
    },
    /// An assembled tensor without any part, of which nobody could tell the dtype.
    NoParts {
        /// The tensor.
        name: String,
    },
    /// Parts of one assembled tensor that differ in dtype.
    MixedDtypes {
        /// The tensor.
        name: String,
        /// Of its first part.
        first: Dtype,
        /// Of a later one.
        other: Dtype,
    },
    /// A part that leaves its assembled tensor.
    PartOutside {
        /// The tensor.
        name: String,
        /// Shape of the part.
        part: Vec<u64>,
        /// Where its first element would lie.
        at: Vec<u64>,
        /// Shape of the tensor.
        whole: Vec<u64>,
    },
    /// Parts that have fewer or more elements than their assembled tensor.
    PartsDoNotCover {
        /// The tensor.
        name: String,
        /// Elements of the parts.
        have: u64,
        /// Elements of the tensor.
        need: u64,
    },
    /// A dequantized part that is not one run of its assembled tensor's elements.
    MadeInColumns {
        /// The tensor.
        name: String,
        /// Shape of the part.
        part: Vec<u64>,
        /// Where its first element would lie.
        at: Vec<u64>,
        /// Shape of the tensor.
        whole: Vec<u64>,
    },
    /// Strides of the caller's memory that do not fit the tensor.
    BadStrides {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
        /// The strides given, in elements.
        strides: Vec<u64>,
    },
    /// Memory with gaps for a tensor that is dequantized, which is written without.
    StridesOfMade {
        /// The tensor.
        name: String,
    },
    /// Tensors that the device map sends nowhere.
    DeviceMap(DeviceMapError),
    /// A part of a quantized tensor that cannot be cut out.
    Cut {
        /// The tensor.
        name: String,
        /// Why.
        source: Box<CutError>,
    },
    /// A slice that does not exist.
    Slice {
        /// The tensor.
        name: String,
        /// Why.
        source: SliceError,
    },
    /// A quantized tensor whose packed bytes are more than the caller allows to wait.
    OverTransientBudget {
        /// The result's name.
        name: String,
        /// Bytes its sources take, rounding included.
        needed_bytes: u64,
        /// Bytes the caller allows.
        max_bytes: u64,
    },
    /// A result larger than the caller allows.
    OverBudget {
        /// Bytes the result takes, rounding included.
        needed_bytes: u64,
        /// Bytes the caller allows.
        max_bytes: u64,
    },
}

impl PlanError {
    /// Returns the tensor at fault, if it is one.
    pub fn tensor(&self) -> Option<&str> {
        match self {
            PlanError::UnknownTensor { name, .. }
            | PlanError::ExternalNotSelected { name }
            | PlanError::SliceNotSelected { name }
            | PlanError::SliceOfMade { name }
            | PlanError::SliceOfAssembled { name }
            | PlanError::Cut { name, .. }
            | PlanError::NoParts { name }
            | PlanError::MixedDtypes { name, .. }
            | PlanError::PartOutside { name, .. }
            | PlanError::PartsDoNotCover { name, .. }
            | PlanError::MadeInColumns { name, .. }
            | PlanError::BadStrides { name, .. }
            | PlanError::StridesOfMade { name }
            | PlanError::OverTransientBudget { name, .. }
            | PlanError::Slice { name, .. } => Some(name),
            _ => None,
        }
    }
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlanError::UnknownTensor { name, tensor_count } => {
                write!(f, "no tensor is named {name:?} (the checkpoint has {tensor_count})")
            }
            PlanError::NothingMatches { glob, tensor_count } => {
                write!(f, "no tensor matches {glob:?} (the checkpoint has {tensor_count})")
            }
            PlanError::BadGlob { glob, what } => write!(f, "{glob:?} is not a glob: {what}"),
            PlanError::ExternalNotSelected { name } => {
                write!(f, "tensor {name:?}: memory is given for it, but the tensor is not selected")
            }
            PlanError::SliceNotSelected { name } => {
                write!(f, "tensor {name:?}: a slice is asked for, but the tensor is not selected")
            }
            PlanError::SliceOfMade { name } => {
                write!(f, "tensor {name:?} is dequantized; a slice with steps of it cannot be asked for")
            }
            PlanError::SliceOfAssembled { name } => {
                write!(f, "tensor {name:?} is put together from parts; a slice of it cannot be asked for")
            }
            PlanError::NoParts { name } => write!(f, "tensor {name:?} is to be put together from nothing"),
            PlanError::MixedDtypes { name, first, other } => {
                write!(f, "tensor {name:?} cannot be put together from parts of {first} and {other}")
            }
            PlanError::PartOutside { name, part, at, whole } => {
                write!(f, "tensor {name:?}: a part of shape {part:?} at {at:?} leaves its shape {whole:?}")
            }
            PlanError::PartsDoNotCover { name, have, need } => {
                write!(f, "tensor {name:?} has {need} elements, its parts have {have}")
            }
            PlanError::MadeInColumns { name, part, at, whole } => {
                write!(
                    f,
                    "tensor {name:?}: a dequantized part of shape {part:?} at {at:?} is not one run of {whole:?}; dequantize \
                     parts that are side by side along rows only"
                )
            }
            PlanError::BadStrides { name, shape, strides } => {
                write!(
                    f,
                    "tensor {name:?}: memory with strides {strides:?} does not fit its shape {shape:?}; one stride a dimension, \
                     in elements, that keep elements apart"
                )
            }
            PlanError::StridesOfMade { name } => {
                write!(
                    f,
                    "tensor {name:?} is dequantized, which needs memory without gaps; give it row-major strides"
                )
            }
            PlanError::DeviceMap(error) => error.fmt(f),
            PlanError::Cut { name, .. } => write!(f, "tensor {name:?} has no such part"),
            PlanError::OverTransientBudget { name, needed_bytes, max_bytes } => {
                write!(
                    f,
                    "tensor {name:?}: its packed bytes take {needed_bytes} bytes, the transient budget is {max_bytes}"
                )
            }
            PlanError::Slice { name, .. } => write!(f, "tensor {name:?} has no such slice"),
            PlanError::OverBudget { needed_bytes, max_bytes } => {
                write!(f, "the result takes {needed_bytes} bytes, the budget is {max_bytes}")
            }
        }
    }
}

impl std::error::Error for PlanError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            PlanError::Slice { source, .. } => Some(source),
            PlanError::Cut { source, .. } => Some(&**source),
            _ => None,
        }
    }
}
