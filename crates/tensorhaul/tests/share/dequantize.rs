//! Ranks that share their reading and dequantize: each ends with the numbers that it would have made of its own reads.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::{Dtype as Stored, TensorView, serialize};
use serde_json::Value;
use tempfile::TempDir;
use tensorhaul::parallel::{Fuse, Parallel, Ranks, Rules, Unmatched};
use tensorhaul::share::SharedLoaded;
use tensorhaul::{Assembly, Dequantization, Dtype, ErrorKind, Handover, LoadOptions, Model, Request, Share};

use crate::cut::cut;
use crate::{assert_told_as_alone, load_on_all, load_on_all_by_sockets};

const TINY_LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/tiny-llama");

/// A Llama of 8-bit floats with a scale for each block, of many staging buffers.
fn blocks() -> (TempDir, Model) {
    let (hidden, inner, vocab, layers) = (512, 1024, 512, 3);
    let mut tensors: Vec<(String, Stored, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut push = |name: String, dtype, shape: &[usize], width: usize| {
        let len = shape.iter().product::<usize>() * width;
        let salt = 31 * tensors.len();
        // No byte is of a NaN, nor of a number that is one after scaling.
        let bytes = (0..len).map(|at| (((at + salt) * 2_654_435_761) >> 13) as u8 & 0x3f).collect();
        tensors.push((name, dtype, shape.to_vec(), bytes));
    };
    push("model.embed_tokens.weight".to_owned(), Stored::BF16, &[vocab, hidden], 2);
    push("lm_head.weight".to_owned(), Stored::BF16, &[vocab, hidden], 2);
    push("model.norm.weight".to_owned(), Stored::BF16, &[hidden], 2);
    for layer in 0..layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            push(format!("model.layers.{layer}.{norm}.weight"), Stored::BF16, &[hidden], 2);
        }
        for (name, shape) in [
            ("self_attn.q_proj", [hidden, hidden]),
            ("self_attn.k_proj", [hidden, hidden]),
            ("self_attn.v_proj", [hidden, hidden]),
            ("self_attn.o_proj", [hidden, hidden]),
            ("mlp.gate_proj", [inner, hidden]),
            ("mlp.up_proj", [inner, hidden]),
            ("mlp.down_proj", [hidden, inner]),
        ] {
            let name = format!("model.layers.{layer}.{name}.weight");
            push(name.clone(), Stored::F8_E4M3, &shape, 1);
            push(format!("{name}_scale_inv"), Stored::F32, &shape.map(|len| len / 128), 4);
        }
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::write(folder.path().join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": layers, "vocab_size": vocab,
        "tie_word_embeddings": false,
        "quantization_config": { "quant_method": "fp8", "weight_block_size": [128, 128] },
    });
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let model = Model::open(folder.path()).unwrap();
    (folder, model)
}

fn options(dtype: Dtype) -> LoadOptions {
    LoadOptions::default()
        .handover(Handover::Private)
        .dequantize(Dequantization::to(dtype))
        .staging_bytes(128 << 10)
        .parallel(Parallel::rank(Ranks::alone()).unmatched(Unmatched::Replicate))
}

type Tensors = BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)>;

fn tensors(tensors: &tensorhaul::Tensors) -> Tensors {
    let one = |(name, tensor): (&str, &tensorhaul::Tensor)| {
        (name.to_owned(), (tensor.dtype(), tensor.shape().to_vec(), tensor.bytes().unwrap().to_vec()))
    };
    tensors.iter().map(one).collect()
}

/// Loads shared, compares each rank's tensors with those of a load of its own, and what is read with the share.
#[track_caller]
fn assert_as_alone(
    model: &Model,
    dtype: Dtype,
    options: &LoadOptions,
    ranks: &[Assembly],
    context: &str,
) -> Share {
    let loads = load_on_all(ranks, |_| model.clone(), |_| options.clone());
    let loads: Vec<SharedLoaded> =
        loads.into_iter().map(|load| load.unwrap_or_else(|error| panic!("{context}: {error:?}"))).collect();
    assert_are_as_alone(model, dtype, ranks, &loads, context);
    let share = model.plan_shared(options, ranks).unwrap();
    let read: u64 = loads.iter().map(|loaded| loaded.report.read_bytes).sum();
    assert_eq!(read, share.plan().promised().read_bytes, "{context}: what is read together");
    share
}

/// Compares each rank's tensors with those of a load of its own.
#[track_caller]
fn assert_are_as_alone(
    model: &Model,
    dtype: Dtype,
    ranks: &[Assembly],
    loads: &[SharedLoaded],
    context: &str,
) {
    for (rank, (shared, assembly)) in loads.iter().zip(ranks).enumerate() {
        let mut request = Request::all();
        request.assembly = Some(Arc::new(assembly.clone()));
        let alone = LoadOptions::default().handover(Handover::Private).request(request);
        let alone = alone.dequantize(Dequantization::to(dtype));
        let expected = tensors(&model.load(&alone).unwrap().tensors);
        let found = tensors(&shared.tensors);
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{context}");
        for (name, tensor) in &found {
            assert!(*tensor == expected[name], "{context}: {name} on rank {rank}");
        }
        let (report, promised) = (&shared.report, shared.report.promised);
        assert_eq!(
            (report.read_bytes, report.sent_bytes, report.received_bytes, report.operations),
            (promised.read_bytes, promised.sent_bytes, promised.received_bytes, promised.operations),
            "{context}: rank {rank}"
        );
        assert!(report.peak_staging_bytes <= 128 << 10, "{context}");
    }
}

/// Tells whether the share reads hardly more than the checkpoint has: the covers of direct reads add less than two pages each.
#[track_caller]
fn assert_read_once(model: &Model, share: &Share, context: &str) {
    let stored: u64 = model.checkpoint().tensors().map(|tensor| tensor.info.len_bytes()).sum();
    let promised = share.plan().promised();
    assert!(
        (stored..=stored + 8192 * promised.reads).contains(&promised.read_bytes),
        "{context}: {} read of {stored} in {}",
        promised.read_bytes,
        promised.reads
    );
}

#[test]
fn every_rank_makes_its_part_of_the_numbers_and_packed_bytes_are_read_once() {
    let (_folder, model) = blocks();
    for (tp_size, pp_size, fuse) in [(1, 1, Fuse::No), (2, 1, Fuse::All), (8, 1, Fuse::No), (2, 2, Fuse::All)]
    {
        let context = format!("tp {tp_size}, pp {pp_size}, {fuse:?}");
        let parallel = Parallel::rank(Ranks::alone()).fuse(fuse);
        let options = options(Dtype::Bf16).parallel(parallel);
        let ranks = model.assemblies(&options, Ranks::all(tp_size, pp_size, 1)).unwrap();
        let share = assert_as_alone(&model, Dtype::Bf16, &options, &ranks, &context);
        assert_read_once(&model, &share, &context);
    }
}

#[test]
fn a_small_budget_for_sources_makes_short_rounds_and_the_same_numbers() {
    let (_folder, model) = blocks();
    let mut waits = 0;
    for (size, transient_bytes) in [(2, 600 << 10), (4, 300 << 10), (8, 140 << 10)] {
        let context = format!("{size} ranks, {transient_bytes} bytes of sources");
        let options = options(Dtype::Bf16).transient_bytes(transient_bytes);
        let ranks = model.assemblies(&options, Ranks::all(size, 1, 1)).unwrap();
        let share = assert_as_alone(&model, Dtype::Bf16, &options, &ranks, &context);
        for rank in 0..size {
            assert!(share.promised(rank).transient_bytes <= transient_bytes, "{context}");
        }
        for round in 0..share.round_count() {
            let after = share.round(round).iter().filter_map(|turn| turn.after);
            waits += after.inspect(|after| assert!((*after as usize) < round)).count();
        }
    }
    assert!(waits > 0, "the budgets are so small that places are taken again");
    let options = options(Dtype::Bf16).transient_bytes(4096);
    let ranks = model.assemblies(&options, Ranks::all(2, 1, 1)).unwrap();
    let error = model.plan_shared(&options, &ranks).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
}

#[test]
fn the_model_of_the_examples_is_shared_dequantized() {
    let model = Model::open(TINY_LLAMA).unwrap();
    for size in [2, 4, 8] {
        for dtype in [Dtype::Bf16, Dtype::F32] {
            let options = options(dtype);
            let ranks = model.assemblies(&options, Ranks::all(size, 1, 1)).unwrap();
            assert_as_alone(&model, dtype, &options, &ranks, &format!("{size} ranks, {dtype}"));
        }
    }
}

#[test]
fn every_familys_tensors_are_cut_on_every_rank() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/quant");
    let manifest: Value = serde_json::from_slice(&fs::read(source.join("manifest.json")).unwrap()).unwrap();
    for case in manifest["cases"].as_array().unwrap() {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let config = serde_json::json!({
            "architectures": ["Test"],
            "torch_dtype": "float16",
            "quantization_config": case["quantization_config"],
        });
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let file = source.join(case["file"].as_str().unwrap());
        fs::copy(file, folder.path().join("model.safetensors")).unwrap();
        let model = Model::open(folder.path()).unwrap();
        for dim in [0, 1] {
            let context = format!("{} along {dim}", case["name"]);
            let share =
                assert_as_alone(&model, Dtype::Bf16, &options(Dtype::Bf16), &cut(&model, 3, dim), &context);
            // Two experts are too few for three ranks.
            assert!((0..3).filter(|rank| share.promised(*rank).operations > 0).count() > 1, "{context}");
        }
    }
}

#[test]
fn assemblies_of_dequantized_tensors_need_the_option_to_dequantize() {
    let (_folder, model) = blocks();
    let ranks = model.assemblies(&options(Dtype::Bf16), Ranks::all(2, 1, 1)).unwrap();
    let error = model.plan_shared(&LoadOptions::default(), &ranks).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest);
    assert!(error.to_string().contains("nothing is to be dequantized"), "{error}");
}

#[test]
fn packed_bytes_that_sockets_carry_make_the_same_numbers() {
    let (_folder, model) = blocks();
    for (size, transient_bytes) in [(2, 600 << 10), (4, 300 << 10)] {
        let context = format!("{size} ranks by sockets");
        let options = options(Dtype::Bf16).transient_bytes(transient_bytes);
        let ranks = model.assemblies(&options, Ranks::all(size, 1, 1)).unwrap();
        let loads = load_on_all_by_sockets(&model, &ranks, &options);
        assert!(loads.iter().all(|loaded| loaded.report.operations > 0 && loaded.report.received_bytes > 0));
        assert_are_as_alone(&model, Dtype::Bf16, &ranks, &loads, &context);
    }
}

#[test]
fn what_stays_unfused_is_told_as_in_a_load_of_ones_own() {
    let (_folder, model) = blocks();
    let parallel = Parallel::rank(Ranks::alone()).fuse(Fuse::All);
    let options = LoadOptions::default().parallel(parallel);
    let ranks = model.assemblies(&options, Ranks::all(2, 1, 1)).unwrap();
    assert_eq!(assert_told_as_alone(&model, &ranks, &options), 4, "two fusions on each of two ranks");
}

#[test]
fn rows_of_padding_are_stated_for_each_rank() {
    // 512 words, padded to 800, in 4 shares: 200, 200, 112 with 88 of padding, and none.
    let rules = r#"{"extends":"LlamaForCausalLM","rules":{
        "lm_head":{"rule":"vocab","pad_to":100},"embed_tokens":{"rule":"vocab","pad_to":100}}}"#;
    let (_folder, model) = blocks();
    let parallel = Parallel::rank(Ranks::alone()).rules(Rules::parse(rules).unwrap());
    let options = LoadOptions::default().parallel(parallel);
    let mut ranks = model.assemblies(&options, Ranks::all(4, 1, 1)).unwrap();
    let padding = |options: &LoadOptions, ranks: &[Assembly], rank| {
        let share = model.plan_shared(options, ranks).unwrap();
        share.padding(rank).map(|(name, rows)| (name.to_owned(), rows)).collect::<Vec<_>>()
    };
    let of_assembly = |assembly: &Assembly| {
        let padding = assembly.padding.iter();
        padding
            .map(|padding| (assembly.tensors[padding.tensor as usize].name.clone(), padding.rows))
            .collect::<Vec<_>>()
    };
    assert!(ranks.iter().any(|assembly| assembly.padding.len() == 2));
    ranks.rotate_left(1); // The rank with padding has others behind it.
    for (rank, assembly) in (0..).zip(&ranks) {
        assert_eq!(padding(&options, &ranks, rank), of_assembly(assembly), "rank {rank}");
    }
    let head = options.request(Request::of(tensorhaul::Select::Globs(vec!["lm_head.*".to_owned()])));
    let (rank, assembly) = (0..).zip(&ranks).find(|(_, assembly)| !assembly.padding.is_empty()).unwrap();
    let mut kept = of_assembly(assembly);
    kept.retain(|(name, _)| name.starts_with("lm_head"));
    assert_eq!(padding(&head, &ranks, rank), kept, "what is not selected has none");
}
