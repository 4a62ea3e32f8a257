//! Why a request cannot be planned.

use std::fmt;

use crate::device_map::DeviceMapError;
use crate::dtype::Dtype;
use crate::quant::CutError;
use crate::slice::SliceError;

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
    /// A bound on what is read that is no factor of what is needed.
    BadOverReadMax {
        /// The number given.
        found: String,
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
            PlanError::BadOverReadMax { found } => {
                write!(
                    f,
                    "reading at most {found} times what is needed cannot be kept; give a number from 1 on"
                )
            }
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
