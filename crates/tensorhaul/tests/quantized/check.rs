//! Loads a checkpoint with and without dequantization, and compares.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fs};

use half::{bf16, f16};
use serde_json::json;
use tensorhaul::{Dequantization, Dtype, LoadOptions, Model, Result, Tensor, Tensors};

use crate::case::{Case, Expected, Tolerance};
use crate::common::{Folder, Stored};

/// Checks that a checkpoint comes out as it is when nothing is asked for, and as its numbers when they are.
pub(crate) fn check(case: &Case) {
    let folder = Folder::on_disk();
    case.write(folder.path());
    keep(case);
    assert_loads_as_stored(case, folder.path());
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        let context = format!("{}, {} files, to {dtype}", case.name, case.file_count);
        let dequantization = Dequantization::to(dtype);
        let dequantization = if case.is_folded { dequantization.fold() } else { dequantization };
        let tensors = dequantized(folder.path(), dequantization)
            .unwrap_or_else(|error| panic!("{context}: {}", error.one_line()));
        assert_names(case, &tensors, &context);
        for expected in &case.expected {
            let tensor = tensors.get(&expected.name).unwrap();
            assert_eq!(
                (tensor.dtype(), tensor.shape()),
                (dtype, &*expected.shape),
                "{context}: {}",
                expected.name
            );
            assert_numbers(case.tolerance, expected, tensor, &context);
        }
        for stored in case.tensors.iter().filter(|stored| case.dense.contains(&stored.name)) {
            assert_is_stored(tensors.get(&stored.name).unwrap(), stored, &context);
        }
    }
}

/// Loads a checkpoint with its quantized tensors turned into numbers.
pub(crate) fn dequantized(path: &Path, dequantization: Dequantization) -> Result<Tensors> {
    let options = LoadOptions::default().dequantize(dequantization);
    Ok(Model::open(path)?.load(&options)?.tensors)
}

/// Checks that a load without dequantization hands over every tensor as it is stored.
pub(crate) fn assert_loads_as_stored(case: &Case, path: &Path) {
    let loaded = Model::open(path).unwrap().load(&LoadOptions::default()).unwrap();
    assert_eq!(loaded.tensors.len(), case.tensors.len(), "{}", case.name);
    for stored in &case.tensors {
        assert_is_stored(loaded.tensors.get(&stored.name).unwrap(), stored, &case.name);
    }
}

pub(crate) fn assert_is_stored(tensor: &Tensor, stored: &Stored, context: &str) {
    let Stored { name, dtype, shape, bytes } = stored;
    assert_eq!((tensor.dtype(), tensor.shape()), (*dtype, &**shape), "{context}: {name}");
    assert!(tensor.bytes().unwrap() == bytes, "{context}: {name}: the bytes differ");
}

/// Checks that scales and the like are gone, and nothing else is.
fn assert_names(case: &Case, tensors: &Tensors, context: &str) {
    let expected = case.expected.iter().map(|expected| &expected.name);
    let due: BTreeSet<&str> = expected.chain(&case.dense).map(String::as_str).collect();
    let found: BTreeSet<&str> = tensors.iter().map(|(name, _)| name).collect();
    let missing: Vec<_> = due.difference(&found).collect();
    let is_extra = |name: &&&str| !case.optional.iter().any(|optional| optional == **name);
    let extra: Vec<_> = found.difference(&due).filter(is_extra).collect();
    assert!(missing.is_empty() && extra.is_empty(), "{context}: missing {missing:?}, too many {extra:?}");
}

pub(crate) fn assert_numbers(tolerance: Tolerance, expected: &Expected, tensor: &Tensor, context: &str) {
    let bytes = tensor.bytes().unwrap();
    let len = tensor.dtype().bits() as usize / 8;
    assert_eq!(bytes.len(), expected.values.len() * len, "{context}: {}", expected.name);
    for (index, (exact, bytes)) in expected.values.iter().zip(bytes.chunks(len)).enumerate() {
        let (due, found, ulp) = match tensor.dtype() {
            Dtype::Bf16 => {
                let found = bf16::from_le_bytes(bytes.try_into().unwrap());
                let due = bf16::from_f32(*exact);
                (due.to_f32(), found.to_f32(), due.to_bits().abs_diff(found.to_bits()))
            }
            Dtype::F16 => {
                let found = f16::from_le_bytes(bytes.try_into().unwrap());
                (f16::from_f32(*exact).to_f32(), found.to_f32(), u16::MAX)
            }
            _ => {
                let found = f32::from_le_bytes(bytes.try_into().unwrap());
                let ulp = bf16::from_f32(*exact).to_bits().abs_diff(bf16::from_f32(found).to_bits());
                (*exact, found, ulp)
            }
        };
        let is_same = due == found || due.is_nan() && found.is_nan();
        let is_near = tolerance == Tolerance::Bf16Ulp && ulp <= 1;
        assert!(is_same || is_near, "{context}: {} element {index}: {found:e}, not {due:e}", expected.name);
    }
}

/// Keeps a checkpoint, if that is asked for, with its expected numbers in a folder of its own.
fn keep(case: &Case) {
    let Some(kept) = env::var_os("TENSORHAUL_KEEP_CASES") else {
        return;
    };
    let folder =
        PathBuf::from(kept).join(format!("{}, {} files", case.name, case.file_count).replace('/', "_"));
    fs::create_dir_all(folder.join("expected")).unwrap();
    case.write(&folder);
    let mut expected = Case::bare(case.name.clone());
    for Expected { name, shape, values } in &case.expected {
        let shape: Vec<usize> = shape.iter().map(|dim| *dim as usize).collect();
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        expected.store(name.clone(), Dtype::F32, &shape, bytes);
    }
    expected.write(&folder.join("expected"));
    let about = json!({"dense": case.dense, "optional": case.optional, "is_folded": case.is_folded});
    fs::write(folder.join("expected/about.json"), about.to_string()).unwrap();
}
