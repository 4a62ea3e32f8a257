//! The public vectors: files that others' writers made, and what they must become.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use tensorhaul_plan::quant::{Configs, Part, Survey, Values};
use tensorhaul_plan::{Checkpoint, File, Header, TensorId};

use super::Found;
use super::decode::decode;

#[test]
fn every_vector_becomes_what_its_writer_meant() {
    let manifest: Value = serde_json::from_slice(&read("manifest.json")).expect("JSON");
    for case in manifest["cases"].as_array().expect("a list") {
        check(case);
    }
}

fn check(case: &Value) {
    let name = case["name"].as_str().expect("a name");
    let stored = Stored::read(case["file"].as_str().expect("a file"));
    let expected = Stored::read(case["expected"].as_str().expect("a file"));
    let mut configs = Configs::none();
    configs.insert(
        "config.json",
        serde_json::json!({"quantization_config": case["quantization_config"]}).to_string(),
    );
    let survey = Survey::new(&stored.checkpoint, &configs).expect("a readable configuration");
    let mut values = Values::none();
    for need in survey.needs() {
        values.insert(need.tensor, &stored.bytes(need.tensor)[..need.len_bytes as usize]);
    }
    let quantization = survey.recognize(&stored.checkpoint, &values);
    assert!(quantization.refused().is_empty(), "{name}: {:?}", quantization.refused());
    let Stored { checkpoint, file } = stored;
    let found = Found { checkpoint, quantization };
    insta::assert_snapshot!(format!("vector_{name}"), found.text());

    let is_plain = |name: &str| {
        found.checkpoint.find(name).is_some_and(|tensor| found.quantization.role_of(tensor.id) == Part::Plain)
    };
    let results = expected.checkpoint.tensors().map(|tensor| tensor.info.name);
    let results = results.filter(|name| !name.ends_with(".bf16") && !is_plain(name));
    assert_eq!(found.quantization.groups().len(), results.count(), "{name}");
    for group in found.quantization.groups() {
        let result =
            expected.checkpoint.find(&group.name).unwrap_or_else(|| panic!("{name}: {}", group.name));
        assert_eq!(group.shape, result.info.shape, "{name}");
        let numbers = decode(group, |role| {
            let (_, id) =
                group.members.iter().find(|(member, _)| *member == role).expect("the recipe's members");
            bytes_of(&found.checkpoint, &file, *id)
        });
        let expected = expected.bytes(result.id).chunks_exact(4);
        let expected = expected.map(|word| f32::from_le_bytes(word.try_into().expect("4 bytes")));
        for (index, (number, expected)) in numbers.iter().zip(expected).enumerate() {
            let is_equal = *number == expected || number.is_nan() && expected.is_nan();
            assert!(is_equal, "{name}: {} {index}: {number} is not {expected}", group.name);
        }
    }
}

struct Stored {
    checkpoint: Checkpoint,
    file: Vec<u8>,
}

impl Stored {
    fn read(name: &str) -> Stored {
        let file = read(name);
        let len_bytes = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
        let header = Header::parse(&file[8..8 + len_bytes], file.len() as u64).expect("a header");
        Stored { checkpoint: Checkpoint::new(vec![File::new(name, header)]).expect("one file"), file }
    }

    fn bytes(&self, id: TensorId) -> &[u8] {
        bytes_of(&self.checkpoint, &self.file, id)
    }
}

fn bytes_of<'f>(checkpoint: &Checkpoint, file: &'f [u8], id: TensorId) -> &'f [u8] {
    let tensor = checkpoint.tensor(id);
    &file[tensor.file_offset_bytes as usize..][..tensor.info.len_bytes() as usize]
}

fn read(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/quant"));
    fs::read(folder.join(name)).expect("a vector that belongs to the repository")
}
