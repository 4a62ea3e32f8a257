//! What a family sees of a checkpoint while it recognises a tensor: its neighbours by name, the configuration, small tensors' bytes.

use super::config::Config;
use super::families::comfy::Layers;
use super::families::gptq::Samples;
use super::values::Values;
use super::{Grid, Number, QuantError, Role};
use crate::checkpoint::{Checkpoint, TensorId, TensorRef};
use crate::dtype::Dtype;

/// Everything that recognition may look at.
pub(super) struct Scene<'s> {
    pub(super) checkpoint: &'s Checkpoint,
    pub(super) config: &'s Config,
    pub(super) values: &'s Values,
    pub(super) samples: &'s Samples,
    pub(super) comfy: &'s Layers,
}

impl<'s> Scene<'s> {
    /// Returns the tensor whose name is `base` and `leaf` together.
    pub(super) fn find(&self, base: &str, leaf: &str) -> Option<TensorRef<'s>> {
        self.checkpoint.find(&[base, leaf].concat())
    }

    /// Returns the first of these that is there.
    pub(super) fn find_any(&self, base: &str, leaves: &[&str]) -> Option<TensorRef<'s>> {
        leaves.iter().find_map(|leaf| self.find(base, leaf))
    }

    /// Returns a tensor that `of` cannot do without.
    pub(super) fn need(
        &self,
        of: &TensorRef<'_>,
        base: &str,
        leaf: &str,
        what: &'static str,
    ) -> Result<TensorRef<'s>, QuantError> {
        self.find(base, leaf).ok_or_else(|| missing(of, &[base, leaf].concat(), what))
    }

    /// Returns the bytes of a small tensor, all of them.
    pub(super) fn value(&self, tensor: &TensorRef<'_>) -> Result<&'s [u8], QuantError> {
        let not_read = || QuantError::NotRead { tensor: tensor.info.name.to_owned() };
        let bytes = self.values.get(tensor.id).ok_or_else(not_read)?;
        if bytes.len() as u64 == tensor.info.len_bytes() { Ok(bytes) } else { Err(not_read()) }
    }
}

/// A name cut after its last dot: `base` ends with the dot, or is empty.
pub(super) fn split(name: &str) -> (&str, &str) {
    name.split_at(name.rfind('.').map_or(0, |dot| dot + 1))
}

/// Returns a module's name from the base of its tensors' names.
pub(super) fn module(base: &str) -> &str {
    base.strip_suffix('.').unwrap_or(base)
}

/// Finds a tensor that by its name scales this one, and that is nobody's scale.
pub(super) fn stray_scale<'c>(
    checkpoint: &'c Checkpoint,
    tensor: &TensorRef<'_>,
    is_taken: impl Fn(TensorId) -> bool,
) -> Option<TensorRef<'c>> {
    let name = tensor.info.name;
    let (base, leaf) = split(name);
    let stem = PACKED_ENDS.iter().find_map(|end| name.strip_suffix(end)).filter(|stem| *stem != base);
    let own = [Some(name), stem].into_iter().flatten();
    let own = own.flat_map(|stem| SCALE_ENDS.iter().map(move |end| [stem, end].concat()));
    // Beside it in the module, where its name says that it is what the module multiplies with.
    let is_weight =
        tensor.info.shape.len() > 1 && ["weight", "packed", "codes"].iter().any(|word| leaf.contains(word));
    let beside = SCALE_LEAVES.iter().filter(|_| is_weight).map(|scale| [base, scale].concat());
    own.chain(beside).filter_map(|name| checkpoint.find(&name)).find(|scale| !is_taken(scale.id))
}

/// What the names of packed tensors end with, and those of their scales do not.
const PACKED_ENDS: [&str; 4] = ["_blocks", "_packed", "_qweight", ".blocks"];

/// What is appended to a name for the tensor that scales it.
const SCALE_ENDS: [&str; 10] = [
    "_scale",
    "_scales",
    "_scale_inv",
    "_weight_scale",
    ".scale",
    ".scales",
    "._scale",
    ".absmax",
    "_absmax",
    "_weight_scale_inv",
];

/// The names that scales have in the module of their weight.
const SCALE_LEAVES: [&str; 9] = [
    "weight_scale",
    "weight_scales",
    "weight_scale_inv",
    "scale_weight",
    "scales",
    "scale",
    "wscales",
    "SCB",
    "absmax",
];

pub(super) fn missing(of: &TensorRef<'_>, name: &str, what: &'static str) -> QuantError {
    QuantError::Missing { tensor: of.info.name.to_owned(), missing: name.to_owned(), what }
}

pub(super) fn wrong_shape(tensor: &TensorRef<'_>, expected: impl Into<String>) -> QuantError {
    QuantError::WrongShape {
        tensor: tensor.info.name.to_owned(),
        found: tensor.info.shape.to_vec(),
        expected: expected.into(),
    }
}

pub(super) fn wrong_dtype(tensor: &TensorRef<'_>, expected: impl Into<String>) -> QuantError {
    let (tensor, found) = (tensor.info.name.to_owned(), tensor.info.dtype);
    QuantError::WrongDtype { tensor, found, expected: expected.into() }
}

pub(super) fn wrong_value(
    tensor: &TensorRef<'_>,
    found: impl Into<String>,
    expected: impl Into<String>,
) -> QuantError {
    let tensor = tensor.info.name.to_owned();
    QuantError::WrongValue { tensor, found: found.into(), expected: expected.into() }
}

pub(super) fn unsupported(
    family: impl Into<String>,
    tensor: &TensorRef<'_>,
    what: impl Into<String>,
) -> QuantError {
    let tensor = Some(tensor.info.name.to_owned());
    QuantError::Unsupported { family: family.into(), tensor, what: what.into() }
}

pub(super) fn ambiguous(
    tensor: &TensorRef<'_>,
    readings: impl Into<String>,
    key: impl Into<String>,
) -> QuantError {
    let tensor = tensor.info.name.to_owned();
    QuantError::Ambiguous { tensor, readings: readings.into(), key: key.into() }
}

pub(super) fn contradiction(
    tensor: &TensorRef<'_>,
    config: impl Into<String>,
    found: impl Into<String>,
) -> QuantError {
    let tensor = tensor.info.name.to_owned();
    QuantError::Contradiction { tensor, config: config.into(), found: found.into() }
}

/// Checks a dtype against those that fit.
pub(super) fn check_dtype(tensor: &TensorRef<'_>, fitting: &[Dtype]) -> Result<(), QuantError> {
    if fitting.contains(&tensor.info.dtype) {
        return Ok(());
    }
    let names: Vec<&str> = fitting.iter().map(|dtype| dtype.name()).collect();
    Err(wrong_dtype(tensor, names.join(" or ")))
}

/// Checks a shape.
pub(super) fn check_shape(tensor: &TensorRef<'_>, shape: &[u64]) -> Result<(), QuantError> {
    if tensor.info.shape == shape { Ok(()) } else { Err(wrong_shape(tensor, format!("{shape:?}"))) }
}

/// Returns the two dims of a matrix.
pub(super) fn two_dims(tensor: &TensorRef<'_>) -> Result<[u64; 2], QuantError> {
    tensor.info.shape.try_into().map_err(|_| wrong_shape(tensor, "two dims"))
}

/// A shape as matrices: all leading dims as the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Matrices {
    pub(super) batch: u64,
    pub(super) rows: u64,
    pub(super) cols: u64,
}

/// Sees a tensor as matrices. A vector is one row.
pub(super) fn matrices(tensor: &TensorRef<'_>) -> Result<Matrices, QuantError> {
    match *tensor.info.shape {
        [] => Ok(Matrices { batch: 1, rows: 1, cols: 1 }),
        [cols] => Ok(Matrices { batch: 1, rows: 1, cols }),
        // The file holds all of it, so the product of its dims fits.
        [ref batch @ .., rows, cols] => Ok(Matrices { batch: batch.iter().product(), rows, cols }),
    }
}

/// Returns how a scale of this dtype is stored, where it is a float of 16 or 32 bits.
pub(super) fn float_number(tensor: &TensorRef<'_>) -> Result<Number, QuantError> {
    match tensor.info.dtype {
        Dtype::F32 => Ok(Number::F32),
        Dtype::F16 => Ok(Number::F16),
        Dtype::Bf16 => Ok(Number::Bf16),
        _ => Err(wrong_dtype(tensor, "F32, F16 or BF16")),
    }
}

/// Returns the product of a tensor's dims; the file holds them, so it fits.
pub(super) fn numel(tensor: &TensorRef<'_>) -> u64 {
    tensor.info.shape.iter().product()
}

/// A grid of one number for so many rows and columns, with so many elements from a group to the next.
pub(super) fn grid(number: Number, per_group: [u64; 2], strides: [u64; 2]) -> Grid {
    // Groups longer than this are whole dimensions, whose stride is 0.
    let saturated = |len: u64| u32::try_from(len.max(1)).unwrap_or(u32::MAX);
    Grid {
        number,
        rows_per_group: saturated(per_group[0]),
        cols_per_group: saturated(per_group[1]),
        batch_stride: 0,
        row_stride: strides[0],
        col_stride: strides[1],
        row_first: 0,
        col_first: 0,
        is_swizzled: false,
    }
}

/// Returns a group size for people, where it is less than a whole row.
pub(super) fn group_size(size: u64, cols: u64) -> Option<u32> {
    u32::try_from(size).ok().filter(|_| size < cols)
}

/// Members of a group: a role each, and optional ones.
pub(super) fn members<const COUNT: usize>(list: [(Role, Option<TensorId>); COUNT]) -> Vec<(Role, TensorId)> {
    list.into_iter().filter_map(|(role, id)| Some((role, id?))).collect()
}
