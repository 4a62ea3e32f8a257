//! A stream hands each tensor over when it is ready, and each tensor lives as long as its holder wants.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::mpsc;

use tensorhaul::{Dtype, EngineChoice, Faults, Handover, LoadOptions, Model, Preference, Tensor};

use crate::common::{
    Dice, Folder, GIVE_BACK, assert_same, awkward, encode, in_memory_files, in_own_process, memory_bytes,
    reference, stored,
};

#[test]
fn tensors_come_while_later_ones_are_not_yet_read() {
    let model = Model::from_memory(in_memory_files(&awkward()), Faults::default()).unwrap();
    let (received, wait_for_receipt) = mpsc::channel();
    let waiting = Mutex::new(Some(wait_for_receipt));
    // The loading thread stops at its first ready tensor until the test has it in hand.
    let options = LoadOptions::default().handover(Handover::Private).staging_bytes(64 << 10).on_progress(
        move |progress| {
            let first = || waiting.lock().unwrap().take();
            if let Some(wait_for_receipt) = (progress.ready_tensors > EMPTY_TENSORS).then(first).flatten() {
                assert!(progress.read_bytes < progress.total_bytes);
                let receipt = wait_for_receipt.recv_timeout(GIVE_BACK);
                receipt.expect("the stream gives a tensor before the load has ended");
            }
        },
    );
    let mut stream = model.stream(&options).unwrap();
    let mut names = Vec::new();
    while names.len() <= EMPTY_TENSORS as usize {
        names.push(stream.next().unwrap().unwrap().0);
    }
    assert!(stream.report().is_none(), "the load goes on");
    received.send(()).unwrap();
    let rest = stream.by_ref().map(|ready| ready.unwrap().0);
    names.extend(rest);
    assert_eq!(names.len(), model.checkpoint().len());
    assert_eq!(stream.report().unwrap().tensors, names.len() as u64);
}

#[test]
fn every_tensor_comes_once_and_outlives_stream_and_model() {
    let folder = Folder::on_disk();
    let paths = folder.checkpoint(&awkward());
    let expected = reference(&paths);
    let mut dice = Dice::printed();
    for handover in [Handover::Mapped, Handover::Private] {
        for in_place in [Preference::Preferred, Preference::Off] {
            if (handover, in_place) == (Handover::Mapped, Preference::Off) {
                continue;
            }
            let model = Model::open(folder.path()).unwrap();
            let options = LoadOptions::default()
                .handover(handover)
                .in_place(in_place)
                .staging_bytes(1 << (12 + dice.below(12)));
            let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
            for ready in model.stream(&options).unwrap() {
                let (name, tensor) = ready.unwrap();
                assert!(tensors.insert(name, tensor).is_none(), "a tensor came twice");
            }
            drop(model);
            assert_same(
                tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)),
                &expected,
                &format!("{options:?}"),
            );
        }
    }
}

#[test]
fn private_tensors_do_not_change_with_their_file() {
    let folder = Folder::on_disk();
    let paths = folder.checkpoint(&awkward());
    let expected = reference(&paths);
    for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::IoUring] {
        folder.checkpoint(&awkward());
        let options = LoadOptions::default().handover(Handover::Private).engine(engine);
        let loaded = Model::open(folder.path()).unwrap().load(&options).unwrap();
        for path in &paths {
            std::fs::File::options().write(true).open(path).unwrap().set_len(0).unwrap();
        }
        assert_same(loaded.tensors.iter(), &expected, &format!("{engine:?}"));
    }
}

#[test]
fn dropping_the_tensors_of_a_layer_frees_its_memory() {
    in_own_process("streaming::dropping_the_tensors_of_a_layer_frees_its_memory", || {
        let folder = Folder::on_disk();
        let weights = (0..3).flat_map(|layer| {
            let name = |part| format!("model.layers.{layer}.{part}.weight");
            [stored(&name("up"), Dtype::U8, &[40 << 20]), stored(&name("down"), Dtype::U8, &[30 << 20])]
        });
        let path = folder.write("layers.safetensors", &encode(&weights.collect::<Vec<_>>(), 0));
        for in_place in [Preference::Preferred, Preference::Off] {
            let options =
                LoadOptions::default().handover(Handover::Private).in_place(in_place).staging_bytes(4 << 20);
            let loaded = Model::open(&path).unwrap().load(&options).unwrap();
            let (mut kept, mut dropped) = (Vec::new(), Vec::new());
            for (name, tensor) in loaded.tensors {
                if name.contains(".1.") { dropped.push(tensor) } else { kept.push((name, tensor)) }
            }
            let first = dropped[0].bytes().unwrap()[..4096].to_vec();
            let before = memory_bytes("RssAnon");
            drop(dropped.pop());
            assert!(dropped[0].bytes().unwrap()[..4096] == first, "its sibling keeps the layer");
            drop(dropped);
            let freed = before.saturating_sub(memory_bytes("RssAnon"));
            assert!(freed >= 69 << 20, "{freed} bytes were freed of a layer of {}", 70 << 20);
            assert!(freed <= 76 << 20, "{freed} bytes were freed, though two layers of three are kept");
            for (name, tensor) in &kept {
                assert_eq!(
                    tensor.bytes().unwrap().len(),
                    if name.contains("up") { 40 << 20 } else { 30 << 20 }
                );
            }
        }
    });
}

#[test]
fn clones_share_their_memory_and_any_of_them_keeps_it() {
    let model = Model::from_memory(in_memory_files(&awkward()), Faults::default()).unwrap();
    let loaded = model.load(&LoadOptions::default()).unwrap();
    let tensor = loaded.tensors.get("model.norm.weight").unwrap();
    let (clone, bytes) = (tensor.clone(), tensor.bytes().unwrap().to_vec());
    assert_eq!(clone.address(), tensor.address());
    drop((loaded, model));
    assert_eq!(clone.bytes().unwrap(), bytes);
}

/// Tensors of [`awkward`] that have no bytes, and are ready before the first read.
const EMPTY_TENSORS: u64 = 2;
