//! Quantized checkpoints arrive as numbers: the same ones on every path, and the right ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use serde_json::Value;
use tempfile::TempDir;
use tensorhaul::convert::{ConvertOptions, convert};
use tensorhaul::quant::Group;
use tensorhaul::save::{SaveOptions, SaveTensor, save};
use tensorhaul::{
    Dequantization, Dtype, EngineChoice, ErrorKind, ExternalMemory, Handover, LoadOptions, Model, Preference,
    Request, Select, Tensor,
};

/// A checkpoint of a real packer, its configuration beside it, and what it must become.
pub(crate) struct Vector {
    pub(crate) name: String,
    pub(crate) folder: TempDir,
    pub(crate) expected: PathBuf,
    /// BF16 may be one off: a family whose scales are multiplied before the code is.
    pub(crate) is_rounded_twice: bool,
}

pub(crate) fn vectors() -> Vec<Vector> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/quant");
    let manifest: Value = serde_json::from_slice(&fs::read(source.join("manifest.json")).unwrap()).unwrap();
    let cases = manifest["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    let vector = |case: &Value| {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let config = serde_json::json!({
            "architectures": ["Test"],
            "torch_dtype": "float16",
            "quantization_config": case["quantization_config"],
        });
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let text = |key: &str| case[key].as_str().unwrap().to_owned();
        fs::copy(source.join(text("file")), folder.path().join("model.safetensors")).unwrap();
        Vector {
            name: text("name"),
            folder,
            expected: source.join(text("expected")),
            is_rounded_twice: case["tolerance"]["bf16"]["max_ulp"] != 0,
        }
    };
    cases.iter().map(vector).collect()
}

/// Compares what was made with what the packer meant; zeros have no sign, NaN is NaN.
pub(crate) fn assert_is_expected<'t>(
    vector: &Vector,
    dtype: Dtype,
    result: impl Fn(&str) -> Option<&'t Tensor>,
    seen: impl Fn(&str, &Tensor) -> (Vec<u64>, Vec<u8>),
) {
    let expected = Model::open(&vector.expected).unwrap();
    let mut compared = 0;
    for stored in expected.checkpoint().tensors() {
        let plain = stored.info.name.strip_suffix(".bf16");
        let (name, of) = (plain.unwrap_or(stored.info.name), plain.map_or(Dtype::F32, |_| Dtype::Bf16));
        if of != dtype {
            continue;
        }
        let found = result(name).unwrap_or_else(|| panic!("{}: {name} is missing", vector.name));
        let (shape, bytes) = seen(name, found);
        assert_eq!(shape, stored.info.shape, "{}: {name}", vector.name);
        if found.dtype() != dtype {
            // Not quantized: unchanged.
            let stored = Model::open(vector.folder.path()).unwrap().tensor(name).unwrap();
            assert_eq!((found.dtype(), bytes), (stored.dtype(), host(&stored)), "{}", vector.name);
            continue;
        }
        let wanted = expected.tensor(stored.info.name).unwrap();
        let (found, wanted) = (bytes, wanted.bytes().unwrap());
        let width = dtype.bits() as usize / 8;
        for (index, (found, wanted)) in found.chunks(width).zip(wanted.chunks(width)).enumerate() {
            let value = |bytes: &[u8]| match bytes {
                [a, b] => f32::from_bits(u32::from(u16::from_le_bytes([*a, *b])) << 16),
                _ => f32::from_le_bytes(bytes.try_into().unwrap()),
            };
            let (a, b) = (value(found), value(wanted));
            let off = (a.to_bits() >> 16).abs_diff(b.to_bits() >> 16);
            let is_close = vector.is_rounded_twice
                && if dtype == Dtype::Bf16 { off <= 1 } else { (a - b).abs() <= 2.4e-7 * b.abs() };
            let is_same = a == b || (a.is_nan() && b.is_nan()) || is_close;
            assert!(is_same, "{}: {name}[{index}] is {a}, expected {b}", vector.name);
        }
        compared += 1;
    }
    assert!(compared > 0, "{}", vector.name);
}

fn to(dtype: Dtype) -> LoadOptions {
    LoadOptions::default().dequantize(Dequantization::to(dtype))
}

fn host(tensor: &Tensor) -> Vec<u8> {
    tensor.bytes().unwrap().to_vec()
}

fn as_it_is(_: &str, tensor: &Tensor) -> (Vec<u64>, Vec<u8>) {
    (tensor.shape().to_vec(), host(tensor))
}

#[test]
fn checkpoints_of_real_packers_become_what_was_packed() {
    for vector in vectors() {
        let model = Model::open(vector.folder.path()).unwrap();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for in_place in [Preference::Preferred, Preference::Off] {
                for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring] {
                    let options = to(dtype).engine(engine).in_place(in_place).staging_bytes(64 << 10);
                    let loaded = model.load(&options).unwrap();
                    assert_is_expected(&vector, dtype, |name| loaded.tensors.get(name), as_it_is);
                    assert!(loaded.report.promised.operations > 0);
                }
            }
        }
    }
}

#[test]
fn packed_bytes_wait_in_no_more_memory_than_allowed() {
    for vector in vectors() {
        let model = Model::open(vector.folder.path()).unwrap();
        // The largest alone must fit: the error says what that takes.
        let error = model.load(&to(Dtype::F32).transient_bytes(0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error:?}");
        let text = error.to_string();
        let needed: u64 = text.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
        for (in_place, extra) in [(Preference::Off, 0), (Preference::Preferred, 0), (Preference::Off, 4096)] {
            let options = to(Dtype::F32).transient_bytes(needed + extra).in_place(in_place);
            let loaded = model.load(&options.threads(3)).unwrap();
            assert!(loaded.report.promised.transient_bytes <= needed + extra, "{}", vector.name);
            assert_is_expected(&vector, Dtype::F32, |name| loaded.tensors.get(name), as_it_is);
        }
    }
}

#[test]
fn a_stream_hands_over_the_same_and_only_what_was_selected() {
    let vector = vectors().remove(0);
    let model = Model::open(vector.folder.path()).unwrap();
    let whole = model.load(&to(Dtype::Bf16)).unwrap();
    let names: Vec<String> = whole.tensors.iter().map(|(name, _)| name.to_owned()).collect();
    for ready in model.stream(&to(Dtype::Bf16)).unwrap() {
        let (name, tensor) = ready.unwrap();
        assert_eq!(host(&tensor), host(whole.tensors.get(&name).unwrap()));
    }
    let request = Request::of(Select::Names(vec![names[0].clone()]));
    let one = model.load(&to(Dtype::Bf16).request(request)).unwrap();
    assert_eq!(one.tensors.len(), 1);
    assert_eq!(host(one.tensors.get(&names[0]).unwrap()), host(whole.tensors.get(&names[0]).unwrap()));
}

#[test]
fn what_is_not_asked_for_stays_packed() {
    let vector = vectors().remove(0);
    let model = Model::open(vector.folder.path()).unwrap();
    let stored = model.load(&LoadOptions::default().handover(Handover::Private)).unwrap();
    assert_eq!(stored.tensors.len(), model.checkpoint().len());
    let error =
        model.load(&LoadOptions::default().dequantize(Dequantization::to(Dtype::F32).only(["nothing*"])));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::BadRequest);
    let error = model.load(&to(Dtype::I32)).unwrap_err();
    assert!(error.to_string().contains("F32, F16 and BF16 work"), "{error}");
    let error = model.load(&to(Dtype::F32).handover(Handover::Mapped)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest);
}

#[test]
fn numbers_land_in_the_callers_own_memory() {
    let vector = vectors().remove(0);
    let model = Model::open(vector.folder.path()).unwrap();
    let whole = model.load(&to(Dtype::F32)).unwrap();
    let (name, tensor) = whole.tensors.iter().next().unwrap();
    let memory: &'static mut [u8] = Box::leak(vec![0u8; tensor.len_bytes() as usize].into());
    let (start, len_bytes) = (NonNull::from(&mut *memory).cast(), memory.len() as u64);
    // SAFETY: the bytes are never freed, and nobody else uses them until the load is over.
    let external = unsafe { ExternalMemory::host(start, len_bytes, Arc::new(())) };
    let request = Request::of(Select::Names(vec![name.to_owned()]));
    let given = model.load(&to(Dtype::F32).request(request).target(name, external)).unwrap();
    let found = given.tensors.get(name).unwrap();
    assert_eq!((found.address(), host(found)), (start.as_ptr().addr() as u64, host(tensor)));
}

/// Returns `[E, K, N]` as `[E, N, K]`.
fn transposed(tensor: &Tensor) -> (Vec<u64>, Vec<u8>) {
    let [experts, cols, rows] = *tensor.shape() else { panic!("{:?}", tensor.shape()) };
    let (bytes, width) = (host(tensor), tensor.dtype().bits() as usize / 8);
    let (rows, cols) = (rows as usize, cols as usize);
    let matrices = bytes.chunks(rows * cols * width);
    let element = |matrix: &[u8], at: usize| {
        let place = at % cols * rows + at / cols;
        matrix[place * width..][..width].to_vec()
    };
    let bytes = matrices.flat_map(|matrix| (0..rows * cols).flat_map(move |at| element(matrix, at)));
    (vec![experts, rows as u64, cols as u64], bytes.collect())
}

#[test]
fn a_plain_copy_holds_the_numbers_and_says_nothing_of_quantization() {
    for vector in vectors() {
        let model = Model::open(vector.folder.path()).unwrap();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let out = vector.folder.path().join(format!("plain-{dtype}"));
            let report = convert(&model, &out, &ConvertOptions::default().dequantize(dtype)).unwrap();
            assert!(report.tensors_dequantized > 0);
            let plain = Model::open(&out).unwrap();
            assert!(plain.quantization().unwrap().is_empty(), "{}", vector.name);
            let loaded = plain.load(&LoadOptions::default()).unwrap();
            let quantization = model.quantization().unwrap();
            let in_rows = |name: &str, tensor: &Tensor| {
                let is_transposed = |group: &Group| group.name == name && group.is_plain_transposed;
                match quantization.groups().iter().any(is_transposed) {
                    true => transposed(tensor),
                    false => as_it_is(name, tensor),
                }
            };
            assert_is_expected(&vector, dtype, |name| loaded.tensors.get(name), in_rows);
            let config = fs::read_to_string(out.join("config.json")).unwrap();
            assert!(!config.contains("quant"), "{config}");
            let name = if dtype == Dtype::F32 { "float32" } else { "bfloat16" };
            assert!(config.contains(name), "{config}");
        }
    }
}

#[test]
fn a_format_that_is_not_known_loads_as_stored_and_says_so_otherwise() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = vectors().remove(0);
    fs::copy(source.folder.path().join("model.safetensors"), folder.path().join("model.safetensors"))
        .unwrap();
    let config = r#"{"quantization_config": {"quant_method": "aqlm", "nbits_per_codebook": 16}}"#;
    fs::write(folder.path().join("config.json"), config).unwrap();
    let model = Model::open(folder.path()).unwrap();
    model.load(&LoadOptions::default()).unwrap();
    let error = model.load(&to(Dtype::F32)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
    assert!(error.to_string().to_lowercase().contains("aqlm"), "{error}");
    assert!(error.to_string().contains("as stored"), "{error}");
}

#[test]
fn the_report_counts_bytes_as_they_are_stored() {
    for vector in vectors() {
        let model = Model::open(vector.folder.path()).unwrap();
        let stored: u64 = model.checkpoint().tensors().map(|tensor| tensor.info.len_bytes()).sum();
        let report = model.load(&to(Dtype::F32)).unwrap().report;
        assert!(report.bytes > stored, "{}: numbers take more than codes", vector.name);
        let probed = report.bytes_hot + report.bytes_cold;
        assert!((1..=stored).contains(&probed), "{}: {probed} of {stored} bytes", vector.name);
    }
}

#[test]
fn a_configuration_that_is_there_and_cannot_be_read_is_an_error() {
    let vector = vectors().remove(0);
    let config = vector.folder.path().join("config.json");
    fs::remove_file(&config).unwrap();
    fs::create_dir(&config).unwrap();
    let model = Model::open(vector.folder.path()).unwrap();
    model.load(&LoadOptions::default()).unwrap();
    let error = model.load(&to(Dtype::F32)).unwrap_err();
    assert!(error.to_string().contains("config.json"), "{error}");
}

#[test]
fn what_cannot_be_dequantized_is_refused_where_it_is_asked_for() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let tensor = |name: &str, dtype, shape: &[u64], bytes: &'static [u8]| SaveTensor {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        bytes: Box::new(bytes),
    };
    let tensors = vec![
        tensor("good.weight", Dtype::F8E4m3, &[2, 2], &[0x38; 4]),
        tensor("good.weight_scale", Dtype::Bf16, &[1], &[0x80, 0x3f]),
        tensor("bad.weight", Dtype::I8, &[2, 2], &[1; 4]),
        tensor("bad.weight_scales", Dtype::Bf16, &[1], &[0x80, 0x3f]),
    ];
    save(folder.path(), tensors, &SaveOptions::default()).unwrap();
    let model = Model::open(folder.path()).unwrap();
    let select = |glob: &str| to(Dtype::F32).request(Request::of(Select::Globs(vec![glob.to_owned()])));
    let loaded = model.load(&select("good.*")).unwrap();
    assert_eq!(loaded.tensors.get("good.weight").unwrap().as_slice::<f32>().unwrap(), [1.0; 4]);
    for options in [to(Dtype::F32), select("bad.weight"), select("*.weight")] {
        let error = model.load(&options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("bad.weight_scales"), "{error}");
    }
    let out = folder.path().join("out");
    convert(&model, &out, &ConvertOptions::default().dequantize(Dtype::F32)).unwrap_err();
    assert!(!out.exists());
}
