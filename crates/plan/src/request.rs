//! What the caller wants: which tensors, which part of each, onto which device.

use std::fmt;
use std::sync::Arc;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use serde::Serialize;

use crate::assembly::Assembly;
use crate::checkpoint::{Checkpoint, TensorId, TensorRef};
use crate::device_map::DeviceMap;
use crate::dtype::Dtype;
use crate::placement::DeviceId;
use crate::plan::PlanError;
use crate::quant::Group;
use crate::slice::Slice;

/// What the caller wants. Everything else in a plan follows from it, the checkpoint and the machine.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Request {
    /// Which tensors.
    pub select: Select,
    /// Parts instead of whole tensors, by name; each must be selected too.
    pub slices: Vec<(String, Slice)>,
    /// What tensors of the result are put together from, such as a rank's parts of a model. Names, globs and everything else in this
    /// request then mean tensors of the result. Default: the result's tensors are the checkpoint's.
    pub assembly: Option<Arc<Assembly>>,
    /// The memory the tensors are handed over in, unless a map or an assembly says otherwise. Default: the host's.
    pub device: DeviceId,
    /// Which tensors go to which devices. Default: all to `device`, or where the assembly puts them.
    pub device_map: Option<Arc<DeviceMap>>,
    /// Tensors that land in memory of the caller's own; each must be selected too.
    pub external: Vec<External>,
    /// The most bytes the result may take on the device, rounding included and the caller's own memory not; a plan that needs more
    /// is refused. Default: no limit but the device's own.
    pub target_bytes_max: Option<u64>,
    /// Which quantized tensors are handed over as numbers. Default: none, all arrive as they are stored.
    pub dequantize: Option<Dequantize>,
    /// The most device memory for packed bytes that wait to be dequantized. Default: 256 MiB, or what the largest
    /// tensor needs; a limit given here that the largest does not fit in refuses the plan. For each device.
    pub transient_bytes_max: Option<u64>,
    /// The most that parts of tensors may make a plan read, as a multiple of its payload: where less than this would be kept of what is
    /// read, only the pieces are read. Default: 1.02.
    pub over_read_max: f64,
}

/// Memory of the caller's own for one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct External {
    /// The tensor's name in the result.
    pub name: String,
    /// Where the memory is.
    pub device: DeviceId,
    /// Elements of the tensor's dtype from neighbour to neighbour of each dimension; `None`: row-major without gaps.
    pub strides: Option<Vec<u64>>,
}

/// Which quantized tensors become numbers, and of which kind.
///
/// Names of a request are then those of the result: a group is selected by the name of what is made of it, and the stored tensors
/// it uses up are handed over only where they are named.
#[derive(Clone, Debug)]
pub struct Dequantize {
    /// What may be dequantized, ascending by [`Group::payload`].
    pub groups: Arc<[Group]>,
    /// Only those whose result matches one of these globs, each of which must match something. `None`: all.
    pub globs: Option<Vec<String>>,
    /// F32, F16 or BF16.
    pub dtype: Dtype,
    /// Order of the result's elements.
    pub layout: Layout,
    /// Whether numbers for each column (`pre_quant_scale`) are multiplied in; else they are handed over as stored.
    pub fold: bool,
}

/// Order of the elements of a dequantized matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// `[N, K]`, as the weight of a linear layer is stored.
    #[default]
    Rows,
    /// `[K, N]` for formats that store neighbouring rows side by side (GPTQ, AWQ GEMM), which spares a transposition; others stay
    /// `[N, K]`.
    AsStored,
    /// As plain checkpoints of the model have it: `[N, K]`, but `[E, K, N]` for the experts of gpt-oss under transformers' names.
    Plain,
}

impl Request {
    /// Asks for every tensor, whole, in host memory.
    pub fn all() -> Request {
        Request::of(Select::All)
    }

    /// Asks for these tensors, whole, in host memory.
    pub fn of(select: Select) -> Request {
        Request {
            select,
            slices: Vec::new(),
            assembly: None,
            device: DeviceId::Host,
            device_map: None,
            external: Vec::new(),
            target_bytes_max: None,
            dequantize: None,
            transient_bytes_max: None,
            over_read_max: OVER_READ_MAX_DEFAULT,
        }
    }

    /// Finds the tensors asked for, in table order.
    ///
    /// # Errors
    /// A name, a glob or a slice that fits no tensor, or a glob that is not one.
    pub fn tensors(&self, checkpoint: &Checkpoint) -> Result<Vec<TensorId>, PlanError> {
        let ids = match &self.select {
            Select::All => checkpoint.tensors().map(|tensor| tensor.id).collect(),
            Select::Names(names) => named(checkpoint, names)?,
            Select::Globs(globs) => matching(checkpoint, globs)?,
            Select::Predicate(keep) => {
                checkpoint.tensors().filter(|tensor| (keep.0)(tensor)).map(|tensor| tensor.id).collect()
            }
        };
        Ok(ids)
    }
}

/// Which tensors of a checkpoint.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Select {
    /// Every tensor.
    All,
    /// These names, each of which must exist. Repeats count once.
    Names(Vec<String>),
    /// Whatever one of these globs matches; each must match something. `*` also crosses dots and
    /// slashes, `?` is one character, `{a,b}` either, `[0-3]` one of a set. A glob that is a tensor's
    /// exact name matches it, whatever characters it holds.
    Globs(Vec<String>),
    /// Whatever this function keeps.
    Predicate(Predicate),
}

impl Select {
    /// Keeps the tensors for which `keep` returns true.
    pub fn predicate(keep: impl Fn(&TensorRef<'_>) -> bool + Send + Sync + 'static) -> Select {
        Select::Predicate(Predicate(Arc::new(keep)))
    }
}

/// A function that keeps or leaves a tensor; see [`Select::predicate`].
#[derive(Clone)]
pub struct Predicate(Arc<dyn Fn(&TensorRef<'_>) -> bool + Send + Sync>);

impl Predicate {
    /// Tells whether the tensor is kept.
    pub(crate) fn keeps(&self, tensor: &TensorRef<'_>) -> bool {
        (self.0)(tensor)
    }
}

impl fmt::Debug for Predicate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Predicate(..)")
    }
}

fn named(checkpoint: &Checkpoint, names: &[String]) -> Result<Vec<TensorId>, PlanError> {
    let find = |name: &String| match checkpoint.find(name) {
        Some(tensor) => Ok(tensor.id),
        None => Err(PlanError::UnknownTensor { name: name.clone(), tensor_count: checkpoint.len() }),
    };
    let mut ids = names.iter().map(find).collect::<Result<Vec<_>, _>>()?;
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn matching(checkpoint: &Checkpoint, globs: &[String]) -> Result<Vec<TensorId>, PlanError> {
    let mut globs = Globs::new(globs)?;
    let hits = checkpoint.tensors().filter(|tensor| globs.is_hit(tensor.info.name));
    let ids = hits.map(|tensor| tensor.id).collect();
    globs.check_each_hit(checkpoint)?;
    Ok(ids)
}

/// Returns what tells whether one of the globs matches, or is, one of the names. What is not a glob matches nothing.
pub fn matcher(globs: &[String]) -> impl FnMut(&[&str]) -> bool {
    let mut globs = Globs::new(globs).ok();
    move |names| globs.as_mut().is_some_and(|globs| names.iter().any(|name| globs.is_hit(name)))
}

/// Globs, each of which must match something.
pub(crate) struct Globs<'r> {
    texts: &'r [String],
    set: GlobSet,
    is_matched: Vec<bool>,
    hits: Vec<usize>,
}

impl<'r> Globs<'r> {
    pub(crate) fn new(texts: &'r [String]) -> Result<Globs<'r>, PlanError> {
        Ok(Globs { texts, set: compile(texts)?, is_matched: vec![false; texts.len()], hits: Vec::new() })
    }

    /// Tells whether one of them matches, or is, the name.
    pub(crate) fn is_hit(&mut self, name: &str) -> bool {
        self.set.matches_into(name, &mut self.hits);
        self.hits.extend((0..self.texts.len()).filter(|glob| self.texts[*glob] == name));
        self.hits.iter().for_each(|hit| self.is_matched[*hit] = true);
        !self.hits.is_empty()
    }

    /// # Errors
    /// [`PlanError::NothingMatches`] with the first that matched nothing so far.
    pub(crate) fn check_each_hit(&self, checkpoint: &Checkpoint) -> Result<(), PlanError> {
        match self.is_matched.iter().position(|matched| !matched) {
            Some(glob) => Err(PlanError::NothingMatches {
                glob: self.texts[glob].clone(),
                tensor_count: checkpoint.len(),
            }),
            None => Ok(()),
        }
    }
}

fn compile(globs: &[String]) -> Result<GlobSet, PlanError> {
    let bad = |glob: &str, what: String| PlanError::BadGlob { glob: glob.to_owned(), what };
    let mut set = GlobSetBuilder::new();
    for text in globs {
        let glob = GlobBuilder::new(text).literal_separator(false).backslash_escape(true).build();
        set.add(glob.map_err(|error| bad(text, error.kind().to_string()))?);
    }
    set.build().map_err(|error| bad(error.glob().unwrap_or_default(), error.kind().to_string()))
}

/// What alignment and gaps that are cheaper to read than to skip may add: with more, ranks that read parts of one file would together
/// read noticeably more than there is.
pub const OVER_READ_MAX_DEFAULT: f64 = 1.02;
