//! Copies a checkpoint, in other shards, as another floating-point type, or dequantized.

mod codes;
mod converted;
mod made;
mod metadata;
mod report;

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use tensorhaul_plan::quant::{self, Pass};
use tensorhaul_plan::{Assembly, DeviceId, Dtype, DtypeKind, Padding, Request, TensorInfo};

use crate::atomic::NewFile;
use crate::cast::can_cast;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::options::LoadOptions;
use crate::parallel::{Parallel, RANKS};
use crate::private::{self, Asking};
use crate::progress::Progress;
use crate::quantized::Dequantization;
use crate::save::{OutFolder, SaveOptions, SaveTensor, write_checkpoint};
use crate::sidecar::{self, Change};
use codes::Quantized;
use converted::Converted;
use made::{Batches, Made};
pub use report::{ConvertReport, Kept, LeftOut, Overflowed};

/// How to convert a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct ConvertOptions {
    cast: Option<Dtype>,
    dequantize: Option<Dtype>,
    parallel: Option<Parallel>,
    over_read_max: Option<f64>,
    device: Option<DeviceId>,
    save: SaveOptions,
}

impl ConvertOptions {
    /// Casts floating-point tensors to F64, F32, F16 or BF16, rounding to nearest. Default: no cast.
    ///
    /// Integers and booleans stay. So do quantized weights: F8 codes that a scale tensor belongs to, F4 and
    /// F6 codes, and the scales themselves, because a code without its scale is another number. The
    /// report lists them.
    pub fn cast(self, dtype: Dtype) -> Self {
        ConvertOptions { cast: Some(dtype), ..self }
    }

    /// Writes a plain checkpoint: quantized tensors (GPTQ, AWQ, FP8, MXFP4, NVFP4, …) become F32, F16 or BF16 under the names they had before they
    /// were quantized, and the configuration says nothing of quantization any more. Default: they stay.
    ///
    /// Factors for input channels (`pre_quant_scale`) are multiplied in, since a plain model does not apply them; scales of
    /// activations are left out. Other tensors stay as they are, unless a cast is asked for, too.
    pub fn dequantize(self, dtype: Dtype) -> Self {
        ConvertOptions { dequantize: Some(dtype), ..self }
    }

    /// Writes what one rank needs of the model, under the names of its tensors. Rows of padding that a vocabulary has for it are not
    /// written, and listed. Cannot be cast on the way. Default: the whole model.
    pub fn parallel(self, parallel: Parallel) -> Self {
        ConvertOptions { parallel: Some(parallel), ..self }
    }

    /// The most that a rank's part may make the conversion read, as a multiple of what is needed; see
    /// [`Request::over_read_max`]. Default: 1.02.
    pub fn over_read_max(self, over_read_max: f64) -> Self {
        ConvertOptions { over_read_max: Some(over_read_max), ..self }
    }

    /// Where tensors are dequantized; the bytes are the same on every device. Default: the host.
    pub fn device(self, device: DeviceId) -> Self {
        ConvertOptions { device: Some(device), ..self }
    }

    /// The most bytes of tensors in one file; see [`SaveOptions::max_shard_bytes`]. Default: no limit.
    pub fn max_shard_bytes(self, max_shard_bytes: u64) -> Self {
        ConvertOptions { save: self.save.max_shard_bytes(max_shard_bytes), ..self }
    }

    /// Called after every write, with totals of what is written so far.
    pub fn on_progress(self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        ConvertOptions { save: self.save.on_progress(progress), ..self }
    }

    /// Ends the conversion with [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled) soon after this
    /// becomes true, and leaves no file.
    pub fn cancel_on(self, cancel: Arc<AtomicBool>) -> Self {
        ConvertOptions { save: self.save.cancel_on(cancel), ..self }
    }
}

/// Writes a model's tensors into a folder, and copies the files that belong to them.
///
/// Tensors go from the page cache through a buffer of 4 MiB, whatever their size; those that are dequantized are loaded in batches of
/// 256 MiB, or one at a time where one is larger. The copy is in place whole
/// or, on error, not at all; see [`save`](crate::save::save) for its files. `config.json`, tokenizer files and
/// their like are copied from the model's folder (for a model opened as a single file: when a `config.json`
/// lies beside it), and after a cast `config.json` names the new dtype.
///
/// # Errors
/// [`ErrorKind::BadRequest`](crate::ErrorKind::BadRequest) when `out_dir` is the model's own folder, holds a
/// checkpoint, or holds a file of a name to be written, and when the dtype to cast to is not one of the four;
/// I/O errors of both sides.
///
/// # Example
/// ```
/// use tensorhaul::convert::{ConvertOptions, convert};
/// use tensorhaul::{Dtype, Model};
///
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/tiny-llama");
/// # let folder = tempfile::tempdir().unwrap();
/// # let out_dir = folder.path().join("f32");
/// let report = convert(&Model::open(path)?, &out_dir, &ConvertOptions::default().cast(Dtype::F32))?;
/// for kept in &report.kept {
///     println!("{} stays {}: {}", kept.tensor, kept.dtype, kept.why);
/// }
/// assert_eq!(Model::open(&out_dir)?.tensor("lm_head.weight")?.dtype(), Dtype::F32);
/// # Ok::<(), tensorhaul::Error>(())
/// ```
pub fn convert(model: &Model, out_dir: &Path, options: &ConvertOptions) -> Result<ConvertReport> {
    let start = Instant::now();
    if let Some(target) = options.cast.filter(|target| !can_cast(Dtype::F32, *target)) {
        return Err(Error::bad_request(format!("nothing is cast to {target}; F64, F32, F16 and BF16 work")));
    }
    if is_same_folder(out_dir, model.folder()) {
        return Err(Error::bad_request("is the model's own folder; name another").in_file(out_dir));
    }
    if options.parallel.is_some() && options.cast.is_some() {
        return Err(Error::bad_request("a rank's part is not cast on the way; cast the whole model first"));
    }
    let overflowed = RefCell::new(Vec::new());
    let (mut metadata, mut left_out) = metadata::joined(model);
    let load = load_options(options);
    if let Some(parallel) = &options.parallel {
        let Some(ranks) = parallel.one_rank() else {
            let what = "a copy is of one rank's part; convert for each rank by itself";
            return Err(Error::bad_request(what));
        };
        // A whole model whose tensors are fused is no part of one.
        if !ranks.is_alone() {
            metadata.insert(RANKS.to_owned(), ranks.to_string());
        }
    }
    // Once for the whole copy: matching the tensors of a large model with their rules takes longer than reading a batch of them.
    let request = private::request(&model.inner, &load)?;
    let batches = Batches::new(model, &load, &request);
    let parts = match (options.dequantize, &options.parallel) {
        (None, None) => stored(model),
        _ => planned(model, &load, &request, &batches, &mut left_out)?,
    };
    let (unfused, unused_rules) = request.assembly.as_ref().map_or_else(Default::default, |assembly| {
        left_out.extend(padding(assembly));
        (assembly.unfused.clone(), assembly.unused_rules.clone())
    });
    let Selected { tensors, kept, tensors_cast, tensors_dequantized, bytes_before } =
        select(model, parts, options.cast, &overflowed);
    let metadata = match options.dequantize {
        None => metadata,
        Some(_) => metadata::without_quantization(metadata, &mut left_out),
    };
    let save = options.save.clone().metadata(metadata);

    let folder = OutFolder::prepare(out_dir)?;
    let change = Change { dtype: options.dequantize.or(options.cast), plain: options.dequantize.is_some() };
    let mut files = sidecar::copy(model, &folder, change, &mut left_out)?;
    let sidecars = files.iter().map(NewFile::name).collect();
    let (written, saved) = write_checkpoint(&folder, tensors, &save)?;
    files.extend(written);
    // Before anyone can see the copy: was it made from one state of the source?
    model.inner.check_unchanged(0..model.checkpoint().files().len() as u32)?;
    folder.publish(files)?;

    let seconds = start.elapsed().as_secs_f64();
    Ok(ConvertReport {
        files: saved.files,
        index: saved.index,
        sidecars,
        tensors: saved.tensors,
        bytes_before,
        bytes: saved.bytes,
        tensors_cast,
        tensors_dequantized,
        kept,
        overflowed: overflowed.into_inner(),
        left_out,
        unfused,
        unused_rules,
        seconds,
        gb_per_s: saved.bytes as f64 / seconds / 1e9,
    })
}

/// A tensor of the copy before anything is cast.
enum Part<'m> {
    /// Whole, as it is.
    Stored(TensorInfo<'m>),
    /// Cut out of one or several.
    PutTogether(SaveTensor<'m>),
    Dequantized(SaveTensor<'m>),
}

fn stored(model: &Model) -> Vec<Part<'_>> {
    model.checkpoint().tensors().map(|tensor| Part::Stored(tensor.info)).collect()
}

/// How dequantized tensors are loaded.
fn load_options(options: &ConvertOptions) -> LoadOptions {
    let mut request = Request::all();
    request.device = options.device.unwrap_or(DeviceId::Host);
    if let Some(over_read_max) = options.over_read_max {
        request.over_read_max = over_read_max;
    }
    let mut load = LoadOptions::default().request(request);
    if let Some(dtype) = options.dequantize {
        load = load.dequantize(Dequantization::to(dtype).fold().plain());
    }
    match &options.parallel {
        Some(parallel) => load.parallel(parallel.clone()),
        None => load,
    }
}

/// Returns the tensors of the copy, in the order of the plan that makes them: files are filled in this order.
fn planned<'b, 'm: 'b>(
    model: &'m Model,
    load: &LoadOptions,
    request: &Request,
    batches: &'b Batches<'m>,
    left_out: &mut Vec<LeftOut>,
) -> Result<Vec<Part<'b>>> {
    let (plan, quantization) =
        (private::plan_of(&model.inner, load, request, Asking::Devices)?, model.quantization()?);
    let mut parts = Vec::with_capacity(plan.tensors().len());
    for placed in plan.tensors() {
        let name = plan.name(placed);
        let is_stored = placed.name.is_none() && placed.shape.is_none();
        let pass = match quantization.role_of(placed.id) {
            quant::Part::PassedThrough(pass) if load.dequantization.is_some() && !placed.is_made() => {
                Some(pass)
            }
            _ => None,
        };
        let why = match pass {
            Some(Pass::Activation) => Some("it scales activations, which a plain model does not"),
            Some(Pass::Marker) => Some("it says that tensors are quantized"),
            _ => None,
        };
        if let Some(why) = why {
            left_out.push(LeftOut { what: name.to_owned(), why: why.to_owned() });
        } else if is_stored && load.parallel.is_none() {
            parts.push(Part::Stored(model.checkpoint().tensor(placed.id).info));
        } else {
            let bytes = Made { name: name.to_owned(), len_bytes: placed.len_bytes, batches, bytes: None };
            let (name, shape) = (name.to_owned(), plan.shape(placed).to_vec());
            let tensor = SaveTensor { name, dtype: placed.dtype, shape, bytes: Box::new(bytes) };
            parts.push(if placed.is_made() { Part::Dequantized(tensor) } else { Part::PutTogether(tensor) });
        }
    }
    Ok(parts)
}

/// Lists the rows that a rank has behind the end of its vocabulary.
fn padding(assembly: &Assembly) -> impl Iterator<Item = LeftOut> {
    let left_out = |Padding { tensor, rows }: &Padding| LeftOut {
        what: format!("{rows} rows of padding behind {:?}", assembly.tensors[*tensor as usize].name),
        why: "they are past the end of the vocabulary, and in no file".to_owned(),
    };
    assembly.padding.iter().map(left_out)
}

struct Selected<'m> {
    tensors: Vec<SaveTensor<'m>>,
    kept: Vec<Kept>,
    tensors_cast: u64,
    tensors_dequantized: u64,
    bytes_before: u64,
}

fn select<'m>(
    model: &'m Model,
    parts: Vec<Part<'m>>,
    target: Option<Dtype>,
    overflowed: &'m RefCell<Vec<Overflowed>>,
) -> Selected<'m> {
    let infos = parts.iter().filter_map(|part| match part {
        Part::Stored(info) => Some(*info),
        Part::PutTogether(_) | Part::Dequantized(_) => None,
    });
    let quantized = Quantized::find(infos);
    let mut selected = Selected {
        tensors: Vec::new(),
        kept: Vec::new(),
        tensors_cast: 0,
        tensors_dequantized: 0,
        bytes_before: model.checkpoint().tensors().map(|tensor| tensor.info.len_bytes()).sum(),
    };
    for part in parts {
        let info = match part {
            Part::Stored(info) => info,
            Part::Dequantized(made) => {
                selected.tensors_dequantized += 1;
                selected.tensors.push(made);
                continue;
            }
            Part::PutTogether(tensor) => {
                selected.tensors.push(tensor);
                continue;
            }
        };
        let mut dtype = info.dtype;
        if let Some(target) =
            target.filter(|target| info.dtype.kind() == DtypeKind::Float && info.dtype != *target)
        {
            match quantized.why_kept(&info) {
                Some(why) => selected.kept.push(Kept { tensor: info.name.to_owned(), dtype, why }),
                None => {
                    dtype = target;
                    selected.tensors_cast += 1;
                }
            }
        }
        let bytes = Box::new(Converted { model, info, dtype, tensor: None, overflowed });
        let (name, shape) = (info.name.to_owned(), info.shape.to_vec());
        selected.tensors.push(SaveTensor { name, dtype, shape, bytes });
    }
    selected
}

fn is_same_folder(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::save::{TensorBytes, save};

    #[test]
    fn an_unscaled_f8_tensor_is_cast_and_an_overflow_is_told() {
        let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let wide: Vec<u8> = [1.0f32, 1e6, -1e6, 2.5].iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor = |name: &str, dtype, numel, bytes| SaveTensor {
            name: name.to_owned(),
            dtype,
            shape: vec![numel],
            bytes,
        };
        let tensors = vec![
            tensor("wide", Dtype::F32, 4, Box::new(&wide[..])),
            tensor("codes", Dtype::F8E4m3, 3, Box::new(&[0x38u8, 0x7f, 0xb8][..])),
            tensor("ids", Dtype::I64, 1, Box::new(&[1u8, 0, 0, 0, 0, 0, 0, 0][..])),
        ];
        save(folder.path(), tensors, &SaveOptions::default()).unwrap();
        let model = Model::open(folder.path()).unwrap();
        let report = convert(&model, out.path(), &ConvertOptions::default().cast(Dtype::F16)).unwrap();
        assert_eq!((report.tensors_cast, report.kept), (2, vec![]));
        assert_eq!(report.overflowed, [Overflowed { tensor: "wide".to_owned(), elements: 2 }]);
        let copy = Model::open(out.path()).unwrap();
        let halves = |name| copy.tensor(name).unwrap().to_vec::<half::f16>().unwrap();
        assert_eq!(halves("wide")[0].to_f32(), 1.0);
        assert!(halves("wide")[1].is_infinite());
        let codes = halves("codes");
        assert!(codes[0].to_f32() == 1.0 && codes[1].is_nan() && codes[2].to_f32() == -1.0);
        assert_eq!(copy.tensor("ids").unwrap().to_vec::<i64>().unwrap(), [1]);
    }

    #[test]
    fn dequantized_tensors_are_written_in_another_order_than_they_are_stored() {
        let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let codes: Vec<u8> = (0..16).collect();
        let tensors = ["b", "a", "d", "c", "f", "e"].map(|name| SaveTensor {
            name: format!("{name}.weight"),
            dtype: Dtype::F8E4m3,
            shape: vec![codes.len() as u64],
            bytes: Box::new(&codes[..]) as Box<dyn TensorBytes + '_>,
        });
        // A file for each, so that they are not sorted by name.
        save(folder.path(), tensors.into(), &SaveOptions::default().max_shard_bytes(16)).unwrap();
        let model = Model::open(folder.path()).unwrap();
        for max_shard_bytes in [u64::MAX, 128] {
            let out = out.path().join(max_shard_bytes.to_string());
            let options = ConvertOptions::default().dequantize(Dtype::F32).max_shard_bytes(max_shard_bytes);
            assert_eq!(convert(&model, &out, &options).unwrap().tensors_dequantized, 6);
            let plain = Model::open(&out).unwrap();
            for name in ["a", "b", "c", "d", "e", "f"] {
                let values = plain.tensor(&format!("{name}.weight")).unwrap().to_vec::<f32>().unwrap();
                assert_eq!(values[8..10], [0.015625, 0.017578125], "{name}"); // 2^-6, and an eighth more.
            }
        }
    }

    #[test]
    fn impossible_conversions_are_refused_before_anything_is_written() {
        let model =
            Model::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/tiny-llama")).unwrap();
        let outer = tempfile::tempdir().unwrap();
        let out = outer.path().join("out");
        let refused = |out: &Path, options| convert(&model, out, &options).unwrap_err().kind();
        assert_eq!(refused(model.folder(), ConvertOptions::default()), ErrorKind::BadRequest);
        assert_eq!(refused(&out, ConvertOptions::default().cast(Dtype::I8)), ErrorKind::BadRequest);
        assert_eq!(refused(&out, ConvertOptions::default().max_shard_bytes(0)), ErrorKind::BadRequest);
        assert!(!out.exists());
        fs::write(outer.path().join("config.json"), "{}").unwrap();
        assert_eq!(refused(outer.path(), ConvertOptions::default()), ErrorKind::BadRequest);
        assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
    }
}
