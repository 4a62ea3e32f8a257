//! The `__metadata__` of a copy.

use std::collections::{BTreeMap, BTreeSet};

use super::LeftOut;
use crate::model::Model;

/// Joins the `__metadata__` of all files. A key on which they disagree belongs to none of the new files.
pub(super) fn joined(model: &Model) -> (BTreeMap<String, String>, Vec<LeftOut>) {
    let (mut joined, mut disagreed) = (BTreeMap::new(), BTreeSet::new());
    for file in model.checkpoint().files() {
        for (key, value) in file.header().metadata() {
            if joined.entry(key.clone()).or_insert_with(|| value.clone()) != value {
                disagreed.insert(key.clone());
            }
        }
    }
    joined.retain(|key, _| !disagreed.contains(key));
    let why = "the model's files have different values for it";
    let left_out = |key| LeftOut { what: format!("__metadata__ {key:?}"), why: why.to_owned() };
    (joined, disagreed.into_iter().map(left_out).collect())
}

/// Leaves out what says that tensors are quantized: torchao's list of names with an entry for each, ComfyUI's description.
pub(super) fn without_quantization(
    mut metadata: BTreeMap<String, String>,
    left_out: &mut Vec<LeftOut>,
) -> BTreeMap<String, String> {
    let names = metadata.get(TORCHAO_NAMES).and_then(|names| serde_json::from_str::<Vec<String>>(names).ok());
    let own = [TORCHAO_NAMES.to_owned(), COMFY_LAYERS.to_owned()];
    for key in names.into_iter().flatten().chain(own) {
        if metadata.remove(&key).is_some() {
            let (what, why) = (format!("__metadata__ {key:?}"), "it says how tensors were quantized");
            left_out.push(LeftOut { what, why: why.to_owned() });
        }
    }
    metadata
}

const TORCHAO_NAMES: &str = "tensor_names";
const COMFY_LAYERS: &str = "_quantization_metadata";

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tensorhaul_io::memory::Faults;

    use super::*;

    #[test]
    fn metadata_on_which_files_disagree_is_left_out() {
        let file = |name: &str, part: &str| {
            let metadata =
                [("format", "pt"), ("part", part)].map(|(key, value)| (key.to_owned(), value.to_owned()));
            let header = tensorhaul_plan::header::encode(&[], &metadata.into(), 0).unwrap();
            (name.to_owned(), Arc::from(header))
        };
        let model = Model::from_memory(vec![file("a", "1"), file("b", "2")], Faults::default()).unwrap();
        let (metadata, left_out) = joined(&model);
        assert_eq!(metadata.into_iter().collect::<Vec<_>>(), [("format".to_owned(), "pt".to_owned())]);
        assert_eq!(left_out[0].what, "__metadata__ \"part\"");
    }
}
