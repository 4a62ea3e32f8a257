//! Quantized checkpoints become numbers on a simulated device: the host's own, in the order and the memory that was promised.

use std::fs;
use std::path::Path;

use tempfile::TempDir;
use tensorhaul::{Dequantization, DeviceId, Dtype, ErrorKind, LoadOptions, Loaded, Model, Request, Tensors};

use crate::suite::sim::Sim;
use crate::vendor::{self, call};

/// A checkpoint of three layers whose packed tensors lie apart from their scales, in two files, as real writers put them: GPTQ of the
/// kind that says nothing but its bits.
pub(crate) fn checkpoint() -> TempDir {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let noise = |len: usize, salt: usize| {
        (0..len).map(|at| (((at + salt) * 2_654_435_761) >> 13) as u8).collect::<Vec<_>>()
    };
    let (rows, cols, group) = (264usize, 512usize, 128usize);
    type Stored = (String, Dtype, Vec<usize>, Vec<u8>);
    let mut files: [Vec<Stored>; 2] = Default::default();
    for layer in 0..6 {
        let name = |leaf: &str| format!("model.layers.{layer}.mlp.up_proj.{leaf}");
        let words = vec![cols / 8, rows];
        files[0].push((name("qweight"), Dtype::I32, words, noise(cols / 8 * rows * 4, layer)));
        let groups = cols / group;
        files[0].push((
            name("qzeros"),
            Dtype::I32,
            vec![groups, rows / 8],
            noise(groups * rows / 2, layer + 7),
        ));
        let scales = (0..groups * rows).flat_map(|at| (0x2c00 + (at as u16 * 37) % 0x400).to_le_bytes());
        files[layer % 2].push((name("scales"), Dtype::F16, vec![groups, rows], scales.collect()));
        files[1].push((
            format!("model.layers.{layer}.norm.weight"),
            Dtype::BF16,
            vec![77],
            noise(154, layer),
        ));
    }
    let mut weight_map = serde_json::Map::new();
    for (number, tensors) in files.iter().enumerate() {
        let file = format!("model-{number}.safetensors");
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        serialize_to_file(views, None, &folder.path().join(&file)).unwrap();
        weight_map.extend(tensors.iter().map(|(name, ..)| (name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
    fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let config = r#"{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128,
        "sym": false, "desc_act": false, "checkpoint_format": "gptq"}}"#;
    fs::write(folder.path().join("config.json"), config).unwrap();
    folder
}

pub(crate) fn onto(device: DeviceId, dtype: Dtype) -> LoadOptions {
    let mut request = Request::all();
    request.device = device;
    let options = LoadOptions::default().request(request).staging_bytes(64 << 10);
    options.dequantize(Dequantization::to(dtype))
}

#[track_caller]
fn assert_same(found: &Loaded, expected: &Tensors, what: &str) {
    assert_eq!(found.tensors.len(), expected.len(), "{what}");
    for (name, tensor) in found.tensors.iter() {
        let expected = expected.get(name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (expected.dtype(), expected.shape()), "{what}: {name}");
        assert_eq!(tensor.device(), vendor::id(0));
        assert!(tensor.to_host().unwrap() == expected.bytes().unwrap(), "{what}: {name}");
    }
}

#[test]
fn a_device_makes_the_numbers_that_the_host_makes() {
    let folder = checkpoint();
    let model = Model::open(folder.path()).unwrap();
    for dtype in [Dtype::Bf16, Dtype::F32, Dtype::F16] {
        let expected = model.load(&onto(DeviceId::Host, dtype)).unwrap().tensors;
        for config in ["", "delay_us=300", "delay_us=300;seed=9;pools=0", "batches=0", "unified=0;batches=0"]
        {
            let sim = Sim::new(config);
            let loaded = model.load(&onto(vendor::id(0), dtype)).unwrap();
            assert_same(&loaded, &expected, config);
            assert_eq!(loaded.report.promised.operations, 6);
            drop(loaded);
            sim.assert_clean(config);
        }
    }
}

#[test]
fn packers_checkpoints_become_the_hosts_numbers() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/quant");
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(source.join("manifest.json")).unwrap()).unwrap();
    let sim = Sim::new("delay_us=50");
    for case in manifest["cases"].as_array().unwrap() {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let config = serde_json::json!({"quantization_config": case["quantization_config"]});
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let file = case["file"].as_str().unwrap();
        fs::copy(source.join(file), folder.path().join("model.safetensors")).unwrap();
        let model = Model::open(folder.path()).unwrap();
        let expected = model.load(&onto(DeviceId::Host, Dtype::F32)).unwrap().tensors;
        let loaded = model.load(&onto(vendor::id(0), Dtype::F32)).unwrap();
        for (name, tensor) in loaded.tensors.iter() {
            let (found, wanted) =
                (tensor.to_host().unwrap(), expected.get(name).unwrap().bytes().unwrap().to_vec());
            let is_same = |found: &[u8], wanted: &[u8]| {
                let value = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
                // NaN is NaN, whatever its bits.
                found == wanted || (value(found).is_nan() && value(wanted).is_nan())
            };
            let is_float = tensor.dtype() == Dtype::F32;
            let same = found.chunks(4).zip(wanted.chunks(4)).all(|(found, wanted)| match is_float {
                true => is_same(found, wanted),
                false => found == wanted,
            });
            assert!(same, "{file}: {name}");
        }
    }
    sim.assert_clean("vectors");
}

#[test]
fn packed_bytes_wait_in_the_memory_promised_and_no_place_is_taken_too_early() {
    let folder = checkpoint();
    let model = Model::open(folder.path()).unwrap();
    let expected = model.load(&onto(DeviceId::Host, Dtype::Bf16)).unwrap().tensors;
    // Room for one tensor, for one and a half, for two.
    for transient_bytes in [80 << 10, 120 << 10, 160 << 10] {
        for config in ["delay_us=400", "delay_us=400;seed=3", "delay_us=2000;seed=5", "pools=0"] {
            let sim = Sim::new(config);
            let options = onto(vendor::id(0), Dtype::Bf16).transient_bytes(transient_bytes);
            let loaded = model.load(&options).unwrap();
            assert_same(&loaded, &expected, config);
            assert!(loaded.report.promised.transient_bytes <= transient_bytes + (16 << 10));
            // What waited is gone: only the result is left.
            let left = sim.report().live["live.bytes"];
            let result = loaded.report.promised.target_bytes;
            assert!(left <= result + 4096, "{config}: {left} bytes for a result of {result}");
            drop(loaded);
            sim.assert_clean(config);
        }
    }
}

#[test]
fn a_failed_module_launch_or_event_is_a_typed_error_and_the_next_load_works() {
    let folder = checkpoint();
    let model = Model::open(folder.path()).unwrap();
    let expected = model.load(&onto(DeviceId::Host, Dtype::Bf16)).unwrap().tensors;
    let options = onto(vendor::id(0), Dtype::Bf16).transient_bytes(120 << 10);
    let sim = Sim::new("delay_us=50");
    drop(model.load(&options).unwrap());
    tensorhaul::release_devices();
    let counts = sim.report().calls;
    for call in [call::MODULE_LOAD, call::FUNCTION, call::LAUNCH, call::STREAM_WAIT_EVENT, call::EVENT_RECORD]
    {
        let count = *counts.get(call).unwrap_or_else(|| panic!("{call} is not called: {counts:?}"));
        for nth in [1, 2, count / 2, count].into_iter().filter(|nth| (1..=count).contains(nth)) {
            tensorhaul::release_devices();
            sim.fail(&format!("fail={call}:{nth}:1"));
            if let Err(error) = model.load(&options) {
                assert_eq!(error.kind(), ErrorKind::Device, "{call}:{nth}: {}", error.one_line());
                assert!(error.one_line().contains(call.trim_end_matches("_v2")), "{}", error.one_line());
            } else {
                // Calls that also let memory go have nobody to tell then.
                assert!(
                    matches!(call, call::STREAM_WAIT_EVENT | call::EVENT_RECORD),
                    "{call}:{nth} failed unnoticed"
                );
            }
            sim.fail("");
            assert_same(&model.load(&options).unwrap(), &expected, call);
            assert!(sim.report().violations.is_empty(), "{call}:{nth}: {:?}", sim.report().violations);
        }
    }
}

#[test]
fn a_load_that_is_dropped_while_tensors_are_made_leaves_nothing() {
    let folder = checkpoint();
    let model = Model::open(folder.path()).unwrap();
    for taken in 0..4 {
        let sim = Sim::new("delay_us=500");
        let options = onto(vendor::id(0), Dtype::F32).transient_bytes(80 << 10);
        let mut stream = model.stream(&options).unwrap();
        let some: Vec<_> = stream.by_ref().take(taken).collect();
        drop(stream);
        drop(some);
        sim.assert_clean("dropped");
    }
}
