//! Packed tensors that storage reads into device memory, whose places are taken again when they have become numbers.

use tensorhaul::{Dequantization, DirectMode, Dtype, Model, Preference, Request};

use crate::{assert_direct_and_clean, evict_all, folder, machine, options};

#[test]
fn packed_tensors_arrive_by_storage_and_become_the_hosts_numbers() {
    let folder = folder();
    write_checkpoint(folder.path());
    evict_all(folder.path());
    let model = Model::open(folder.path()).unwrap();
    let dequantize = || Dequantization::to(Dtype::Bf16);
    let on_host = options(Preference::Off).request(Request::all()).dequantize(dequantize());
    let expected = model.load(&on_host).unwrap();
    for config in ["", "delay_us=500", "direct_short=2"] {
        for mode in [DirectMode::default(), DirectMode::Batch { entries: 8 }] {
            // Room for the smallest ring: places are taken again and again.
            for transient_bytes in [None, Some(300_000)] {
                let sim = machine(config);
                let mut options = options(Preference::Required).direct_mode(mode).dequantize(dequantize());
                if let Some(transient_bytes) = transient_bytes {
                    options = options.transient_bytes(transient_bytes);
                }
                let loaded = model.load(&options).unwrap();
                assert!(loaded.report.bytes_direct_storage > 0);
                assert_eq!(loaded.tensors.len(), expected.tensors.len());
                for (name, tensor) in loaded.tensors.iter() {
                    let expected = expected.tensors.get(name).unwrap();
                    assert!(
                        tensor.to_host().unwrap() == expected.bytes().unwrap(),
                        "{config} {mode:?}: {name}"
                    );
                }
                drop(loaded);
                assert_direct_and_clean(&sim, config);
            }
        }
    }
}

/// Eight layers of GPTQ with 4 bits, each packed tensor long enough for a read of its own.
fn write_checkpoint(folder: &std::path::Path) {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let noise = |len: usize, salt: usize| {
        (0..len).map(|at| (((at + salt) * 2_654_435_761) >> 13) as u8).collect::<Vec<_>>()
    };
    let (rows, cols, group) = (264usize, 512usize, 128usize);
    let groups = cols / group;
    let mut tensors = Vec::new();
    for layer in 0..8 {
        let name = |leaf: &str| format!("model.layers.{layer}.mlp.up_proj.{leaf}");
        let scales = (0..groups * rows).flat_map(|at| (0x2c00 + (at as u16 * 37) % 0x400).to_le_bytes());
        let zeros = noise(groups * rows / 2, layer + 7);
        tensors.push((name("qweight"), Dtype::I32, vec![cols / 8, rows], noise(cols / 8 * rows * 4, layer)));
        tensors.push((name("qzeros"), Dtype::I32, vec![groups, rows / 8], zeros));
        tensors.push((name("scales"), Dtype::F16, vec![groups, rows], scales.collect()));
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    let config = r#"{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128,
        "sym": false, "desc_act": false, "checkpoint_format": "gptq"}}"#;
    std::fs::write(folder.join("config.json"), config).unwrap();
}
