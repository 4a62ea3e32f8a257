//! Quantized tensors of a model: what is known of them, and which a load makes numbers of.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use tensorhaul_plan::quant::{Configs, Need, QuantError, Quantization, Role, Survey, Values};
use tensorhaul_plan::request::matcher;
use tensorhaul_plan::{Dequantize, Dtype, Layout, Operation, Select, TensorId};

use crate::error::{Error, ErrorKind, Result};
use crate::locate::read_limited;
use crate::model::{Inner, Source};
use crate::parallel::RANKS;
use crate::report::Fallback;

/// Which quantized tensors arrive as numbers, and of which kind: FP8, GPTQ, AWQ and their relatives become F32, F16 or BF16 where they are
/// loaded to, by one rounding to nearest. Tensors that are not quantized arrive as they are stored.
///
/// # Example
/// ```no_run
/// use tensorhaul::{Dequantization, Dtype, LoadOptions, Model};
///
/// let model = Model::open("org/model-GPTQ-Int4")?;
/// let loaded = model.load(&LoadOptions::default().dequantize(Dequantization::to(Dtype::Bf16)))?;
/// let weight = loaded.tensors.get("model.layers.0.mlp.up_proj.weight").unwrap(); // Stored as .qweight, .qzeros, .scales.
/// # Ok::<(), tensorhaul::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Dequantization {
    dtype: Dtype,
    only: Option<Vec<String>>,
    layout: Layout,
    fold: bool,
}

impl Dequantization {
    /// Makes every quantized tensor this dtype: F32, F16 or BF16.
    pub fn to(dtype: Dtype) -> Dequantization {
        Dequantization { dtype, only: None, layout: Layout::Rows, fold: false }
    }

    /// Only those whose name in the result (`….weight`) matches one of these globs, each of which must match something; the others
    /// arrive packed. Default: all.
    pub fn only(self, globs: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Dequantization { only: Some(globs.into_iter().map(Into::into).collect()), ..self }
    }

    /// Keeps `[in, out]` for formats that store neighbouring outputs side by side (GPTQ, AWQ GEMM). Default: `[out, in]` for all, as a linear
    /// layer's weight.
    pub fn as_stored(self) -> Self {
        Dequantization { layout: Layout::AsStored, ..self }
    }

    /// Lays each tensor out as a plain checkpoint of the model has it.
    pub(crate) fn plain(self) -> Self {
        Dequantization { layout: Layout::Plain, ..self }
    }

    /// Multiplies a factor for each input channel (`pre_quant_scale`) into the weights. Default: it is handed over as stored, for the
    /// activations to be multiplied with.
    pub fn fold(self) -> Self {
        Dequantization { fold: true, ..self }
    }
}

/// Completes a request with the groups to dequantize.
pub(crate) fn dequantize(model: &Inner, options: &Dequantization, select: &Select) -> Result<Dequantize> {
    let Dequantization { dtype, only, layout, fold } = options.clone();
    if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16) {
        return Err(Error::bad_request(format!("nothing is dequantized to {dtype}; F32, F16 and BF16 work")));
    }
    let quantization = model.quantization()?;
    if let Some(refusal) = refusal(model, &quantization, only.as_deref(), select) {
        return Err(refused(model, refusal.clone()));
    }
    Ok(Dequantize { groups: quantization.shared_groups(), globs: only, dtype, layout, fold })
}

/// Returns what is odd about how the checkpoint is quantized, but decided: whoever asks for the numbers should know.
pub(crate) fn warnings(model: &Inner) -> Result<Vec<Fallback>> {
    let quantization = model.quantization()?;
    let told = quantization.warnings().iter();
    Ok(told.map(|why| Fallback::new("quantization is read otherwise than described", why)).collect())
}

/// Finds a tensor that was asked for and cannot be dequantized. Of several globs, one that matches a refused tensor, or what it would become, is
/// enough: whoever names it wants it.
fn refusal<'q>(
    model: &Inner,
    quantization: &'q Quantization,
    only: Option<&[String]>,
    select: &Select,
) -> Option<&'q QuantError> {
    let mut is_chosen = only.map(matcher);
    let mut is_globbed = match select {
        Select::Globs(globs) => Some(matcher(globs)),
        _ => None,
    };
    let mut is_wanted = |tensor: TensorId| {
        let name = model.checkpoint.tensor(tensor).info.name;
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        let result = format!("{module}.weight");
        let names = [name, &result, name.strip_suffix("_blocks").unwrap_or(name)];
        let is_selected = match (select, &mut is_globbed) {
            (Select::Names(selected), _) => {
                selected.iter().any(|selected| names.contains(&selected.as_str()))
            }
            (_, Some(is_globbed)) => is_globbed(&names),
            // A predicate sees tensors by itself.
            _ => true,
        };
        is_selected && is_chosen.as_mut().is_none_or(|is_chosen| is_chosen(&names))
    };
    let mut refused = quantization.refused().iter();
    refused.find(|refused| refused.tensor.is_none_or(&mut is_wanted)).map(|refused| &refused.error)
}

/// Checks that the columns of every tensor with a group index name groups that it has. Kernels do not look, and a scale of another group
/// would give wrong numbers; so would an index that was never filled, which names one group for all columns. Reads 4 bytes a column, a
/// thousandth of what is quantized so.
pub(crate) fn check_group_indices<'o>(
    model: &Inner,
    operations: impl IntoIterator<Item = &'o Operation>,
) -> Result<()> {
    for operation in operations {
        let Some(group_count) = operation.recipe.group_index else { continue };
        for source in operation.sources.iter().filter(|source| source.role == Role::GroupIndex) {
            let stored = model.checkpoint.tensor(source.id);
            // All of it, also where a part of the columns is wanted: it is one index.
            let bytes = model.read(stored.file, stored.file_offset_bytes, stored.info.len_bytes())?;
            let groups = bytes.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes));
            let is_outside = |group: i32| u32::try_from(group).map_or(true, |group| group >= group_count);
            let wrong = |found: String, expected: String| {
                let tensor = stored.info.name.to_owned();
                quant_error(QuantError::WrongValue { tensor, found, expected }, &model.folder)
            };
            let mut col_counts = HashMap::new();
            for (column, group) in groups.enumerate() {
                if is_outside(group) {
                    let expected = format!("a group from 0 to {}", group_count.saturating_sub(1));
                    return Err(wrong(format!("group {group} for column {column}"), expected));
                }
                *col_counts.entry(group).or_insert(0) += 1;
            }
            let Some(col_count_max) = col_count_max(bytes.len() as u64 / 4, group_count) else { continue };
            let fullest = col_counts.into_iter().max_by_key(|(group, count)| (*count, Reverse(*group)));
            if let Some((group, count)) = fullest.filter(|(_, count)| *count > col_count_max) {
                let expected = format!("at most {col_count_max} columns of one of {group_count} groups");
                return Err(wrong(format!("group {group} for {count} columns"), expected));
            }
        }
    }
    Ok(())
}

/// Returns the most columns that one of so many groups can have, whatever their size: all groups but the last are full.
fn col_count_max(cols: u64, group_count: u32) -> Option<u64> {
    cols.checked_sub(1)?.checked_div(u64::from(group_count).checked_sub(1)?)
}

impl Inner {
    /// Recognises what is quantized, at the first call: reads the configuration files beside the tensors, and the few bytes of small
    /// tensors that describe others.
    pub(crate) fn quantization(&self) -> Result<Arc<Quantization>> {
        if let Some(known) = self.quantization.get() {
            return Ok(Arc::clone(known));
        }
        let failed = |error| quant_error(error, &self.folder);
        let survey = Survey::new(&self.checkpoint, &self.configs()?).map_err(failed)?;
        let values = self.values(survey.needs())?;
        let recognised = survey.recognize(&self.checkpoint, &values);
        Ok(Arc::clone(self.quantization.get_or_init(|| Arc::new(recognised))))
    }

    fn configs(&self) -> Result<Configs> {
        let mut configs = Configs::none();
        if let Source::Memory { .. } = self.source {
            return Ok(configs);
        }
        for name in Configs::FILES {
            let path = self.folder.join(name);
            // One that is there and cannot be read may say what no tensor says: that is an error.
            if matches!(fs::symlink_metadata(&path), Err(error) if error.kind() == io::ErrorKind::NotFound) {
                continue;
            }
            let bytes = read_limited(&path, Configs::LEN_BYTES_MAX)?;
            configs.insert(name, bytes);
        }
        Ok(configs)
    }

    /// Reads the first bytes of small tensors. Writers put tensors of one dtype side by side, so neighbours share a read.
    fn values(&self, needs: &[Need]) -> Result<Values> {
        let mut values = Values::none();
        let mut places: Vec<_> = needs
            .iter()
            .map(|need| {
                let stored = self.checkpoint.tensor(need.tensor);
                (stored.file, stored.file_offset_bytes, need)
            })
            .collect();
        places.sort_by_key(|(file, offset_bytes, _)| (*file, *offset_bytes));
        let mut rest = places.as_slice();
        while let [(file, begin, first), ..] = *rest {
            let mut end = begin + first.len_bytes;
            let mut count = 1;
            for (next_file, offset_bytes, need) in &rest[1..] {
                let next_end = offset_bytes + need.len_bytes;
                if *next_file != file
                    || *offset_bytes > end + GAP_LEN_BYTES_MAX
                    || next_end - begin > READ_LEN_BYTES_MAX
                {
                    break;
                }
                end = end.max(next_end);
                count += 1;
            }
            let bytes = self.read(file, begin, end - begin)?;
            for (_, offset_bytes, need) in &rest[..count] {
                let from = (offset_bytes - begin) as usize;
                values.insert(need.tensor, &bytes[from..from + need.len_bytes as usize]);
            }
            rest = &rest[count..];
        }
        Ok(values)
    }

    /// Reads whole tensors, small ones.
    pub(crate) fn values_of(&self, tensors: &[TensorId]) -> Result<Values> {
        let len_bytes = |tensor| self.checkpoint.tensor(tensor).info.len_bytes();
        let needs: Vec<_> =
            tensors.iter().map(|id| Need { tensor: *id, len_bytes: len_bytes(*id) }).collect();
        self.values(&needs)
    }

    fn read(&self, file: u32, offset_bytes: u64, len_bytes: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len_bytes as usize]; // No longer than a tensor of the file.
        match &self.source {
            Source::Files(files) => {
                let open = &files[file as usize];
                let read = open.cached().read_exact_at(&mut bytes, offset_bytes);
                read.map_err(|error| Error::io("reading what describes its tensors", open.path(), error))?;
            }
            Source::Memory { files, .. } => {
                let from = offset_bytes as usize;
                bytes.copy_from_slice(&files[file as usize][from..from + len_bytes as usize]);
            }
        }
        Ok(bytes)
    }
}

/// Says why a tensor cannot be dequantized. What does not fit together in a rank's part is no fault of its files.
fn refused(model: &Inner, error: QuantError) -> Error {
    use QuantError::{Contradiction, WrongShape, WrongValue};
    let tensor = error.tensor().and_then(|name| model.checkpoint.find(name));
    let file = tensor.map(|tensor| &model.checkpoint.files()[tensor.file as usize]);
    let ranks = file.and_then(|file| file.header().metadata().get(RANKS));
    match (ranks, &error) {
        (Some(ranks), WrongShape { .. } | WrongValue { .. } | Contradiction { .. }) => {
            let name = error.tensor().unwrap_or_default().to_owned();
            let cause = RankPart { ranks: ranks.clone(), error };
            Error::new(ErrorKind::BadRequest, cause).in_file(&model.folder).about_tensor(&name)
        }
        _ => quant_error(error, &model.folder),
    }
}

/// A rank's packed part that says of itself what holds for the whole.
#[derive(Debug)]
struct RankPart {
    ranks: String,
    error: QuantError,
}

impl fmt::Display for RankPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "is one rank's packed part ({}), which cannot be dequantized by itself; dequantize the whole model while it is cut \
             (convert --dequantize with the same ranks, or load it so)",
            self.ranks
        )
    }
}

impl std::error::Error for RankPart {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

fn quant_error(error: QuantError, folder: &Path) -> Error {
    let kind = if error.is_unsupported() { ErrorKind::Unsupported } else { ErrorKind::Malformed };
    let tensor = error.tensor().map(str::to_owned);
    let error = Error::new(kind, error).in_file(folder);
    match tensor {
        Some(tensor) => error.about_tensor(&tensor),
        None => error,
    }
}

/// Gaps up to this are read along; a read costs as much as copying 64 KiB.
const GAP_LEN_BYTES_MAX: u64 = 32 << 10;

/// The most that one read takes.
const READ_LEN_BYTES_MAX: u64 = 1 << 20;
