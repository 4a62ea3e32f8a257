//! Plans in the words of transformers, against `torch.chunk` done naively.

use tensorhaul_plan::parallel::{Fuse, ModelConfig, Partition, Ranks, Rules, Setup};
use tensorhaul_plan::{DeviceId, Dtype};

use crate::models::{self, Model, TINY, Tensor};

/// The rows or columns that `torch.chunk(tensor, size)[rank]` has, none where there are fewer chunks.
fn chunk(len: u64, rank: u64, size: u64) -> (u64, u64) {
    let each = (0..).find(|each| each * size >= len).unwrap();
    let indices: Vec<u64> = (0..len).filter(|index| each > 0 && index / each == rank).collect();
    indices.first().map_or((0, 0), |first| (*first, indices.len() as u64))
}

fn model(tensors: &[(&str, &[u64])]) -> Model {
    let tensor = |(name, shape): &(&str, &[u64])| Tensor {
        name: name.to_string(),
        dtype: Dtype::Bf16,
        shape: shape.to_vec(),
    };
    let config = r#"{"num_hidden_layers":2,"num_experts":8}"#.to_owned();
    Model { config, tensors: tensors.iter().map(tensor).collect(), files: 1 }
}

/// The shape of a tensor on a rank, and for each part where it begins in the stored tensor, per dimension.
fn of(model: &Model, plan: &str, ranks: Ranks, name: &str) -> (Vec<u64>, Vec<Vec<u64>>) {
    let checkpoint = model.checkpoint();
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::parse(plan).unwrap();
    let partition = Partition::new(&checkpoint, &config, &rules, &Setup::default()).unwrap();
    let share = partition.share(&ranks, DeviceId::Host).unwrap();
    let tensor = share.assembly.tensors.into_iter().find(|tensor| tensor.name == name).unwrap();
    let starts =
        tensor.parts.iter().map(|part| part.slice.ranges().iter().map(|range| range.start).collect());
    (tensor.shape.into_vec(), starts.collect())
}

#[test]
fn columns_and_rows_are_chunked_evenly_or_not() {
    let model = model(&[("model.layers.1.a.weight", &[13, 9]), ("model.layers.1.a.bias", &[13])]);
    for (size, rank) in
        [1, 2, 3, 4, 8, 14].into_iter().flat_map(|size| (0..size).map(move |rank| (size, rank)))
    {
        let ranks = || Ranks::alone().tp(rank, size);
        let (rank, size) = (u64::from(rank), u64::from(size));
        for word in ["colwise", "colwise_rep", "colwise_gather_output", "local_colwise", "embedding_rowwise"]
        {
            let plan = format!(r#"{{"layers.*.a":"{word}"}}"#);
            let (start, len) = chunk(13, rank, size);
            let (shape, starts) = of(&model, &plan, ranks(), "model.layers.1.a.weight");
            assert_eq!(shape, [len, 9]);
            if len > 0 && size > 1 {
                assert_eq!(starts, [[start]]);
            }
            assert_eq!(of(&model, &plan, ranks(), "model.layers.1.a.bias").0, [len]);
        }
        for word in ["rowwise", "rowwise_rep", "rowwise_split_input", "local_rowwise", "embedding_colwise"] {
            let plan = format!(r#"{{"model.layers.*.a":"{word}"}}"#);
            let (start, len) = chunk(9, rank, size);
            let (shape, starts) = of(&model, &plan, ranks(), "model.layers.1.a.weight");
            assert_eq!(shape, [13, len]);
            if len > 0 && size > 1 {
                assert_eq!(starts, [[0, start]]);
            }
            assert_eq!(
                of(&model, &plan, ranks(), "model.layers.1.a.bias").0,
                [13],
                "added behind the sum, by every rank"
            );
        }
    }
}

#[test]
fn packs_are_chunked_half_by_half_and_experts_by_their_ranks() {
    let model = model(&[
        ("layers.0.mlp.experts.gate_up_proj", &[8, 12, 6]),
        ("layers.0.mlp.experts.gate_up_proj_bias", &[8, 12]),
        ("layers.0.mlp.experts.down_proj", &[8, 6, 6]),
        ("layers.0.attn.sinks", &[6]),
        ("layers.0.norm.weight", &[6]),
    ]);
    let plan = r#"{"layers.*.mlp.experts.gate_up_proj":"packed_colwise","layers.*.mlp.experts.down_proj":"rowwise",
        "layers.*.mlp.experts":"moe_tp_experts","layers.*.attn.sinks":"local_rowwise"}"#;
    let ranks = Ranks::alone().tp(1, 3);
    let (shape, starts) = of(&model, plan, ranks.clone(), "layers.0.mlp.experts.gate_up_proj");
    assert_eq!((shape, starts), (vec![8, 4, 6], vec![vec![0, 2], vec![0, 8]]));
    assert_eq!(of(&model, plan, ranks.clone(), "layers.0.mlp.experts.down_proj").0, [8, 6, 2]);
    assert_eq!(of(&model, plan, ranks.clone(), "layers.0.attn.sinks").0, [2]);
    assert_eq!(of(&model, plan, ranks.clone(), "layers.0.norm.weight").0, [6]);

    let plan = r#"{"layers.*.mlp.experts.gate_up_proj":"local_packed_rowwise","layers.*.mlp.experts.down_proj":"packed_rowwise"}"#;
    let (shape, starts) = of(&model, plan, ranks, "layers.0.mlp.experts.down_proj");
    assert_eq!((shape, starts), (vec![8, 6, 2], vec![vec![0, 0, 1], vec![0, 0, 4]]));

    let plan = r#"{"layers.*.mlp.experts.gate_up_proj":"grouped_gemm","layers.*.mlp.experts.gate_up_proj_bias":"grouped_gemm"}"#;
    let ranks = Ranks::alone().tp(1, 3).ep(3, 4);
    let (shape, starts) = of(&model, plan, ranks.clone(), "layers.0.mlp.experts.gate_up_proj");
    assert_eq!((shape, starts), (vec![2, 12, 6], vec![vec![6]]));
    assert_eq!(of(&model, plan, ranks, "layers.0.mlp.experts.gate_up_proj_bias").0, [2, 12]);
}

#[test]
fn a_plan_for_packed_experts_holds_for_files_that_have_them_one_by_one() {
    let plan = r#"{"layers.*.mlp.experts.gate_up_proj":"packed_colwise","layers.*.mlp.experts.down_proj":"rowwise"}"#;
    for (model, up) in [
        (models::qwen_moe("Qwen3MoeForCausalLM", &TINY), "model.layers.0.mlp.experts.5.up_proj.weight"),
        (models::mixtral(&TINY), "model.layers.0.block_sparse_moe.experts.5.w3.weight"),
    ] {
        let down = up.replace("up_proj", "down_proj").replace("w3", "w2");
        assert_eq!(of(&model, plan, Ranks::alone().tp(2, 3), up), (vec![8, 8], vec![vec![16]]));
        assert_eq!(of(&model, plan, Ranks::alone().tp(2, 3), &down), (vec![8, 8], vec![vec![0, 16]]));
        assert_eq!(of(&model, plan, Ranks::alone().ep(1, 2), up).0, [24, 8]);
    }
}

#[test]
fn a_dense_models_own_plan_cuts_it_as_its_table_does_where_heads_fit() {
    let plan = r#"{"layers.*.self_attn.q_proj":"colwise","layers.*.self_attn.k_proj":"colwise","layers.*.self_attn.v_proj":"colwise",
        "layers.*.self_attn.o_proj":"rowwise","layers.*.mlp.gate_proj":"colwise","layers.*.mlp.up_proj":"colwise","layers.*.mlp.down_proj":"rowwise",
        "layers.*.self_attn.q_norm":"replicated_with_grad_allreduce","layers.*.self_attn.k_norm":"replicated_with_grad_allreduce"}"#;
    let model = models::llama("Qwen3ForCausalLM", &TINY);
    let checkpoint = model.checkpoint();
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let [table, plan] = [Rules::of(&config).unwrap(), Rules::parse(plan).unwrap()];
    for ranks in Ranks::all(4, 3, 1) {
        let tensors = |rules: &Rules| {
            let setup = Setup { fuse: Fuse::No, ..Setup::default() };
            let share = Partition::new(&checkpoint, &config, rules, &setup)
                .unwrap()
                .share(&ranks, DeviceId::Host)
                .unwrap();
            let layers = share
                .assembly
                .tensors
                .into_iter()
                .filter(|tensor| tensor.name.contains("layers") || tensor.name.contains("norm"));
            layers.collect::<Vec<_>>()
        };
        assert_eq!(tensors(&plan), tensors(&table), "{ranks}");
    }
}

#[test]
fn rules_that_no_tensor_has_are_told() {
    let checkpoint = model(&[("layers.0.a.weight", &[4, 4])]).checkpoint();
    let rules = Rules::parse(r#"{"layers.*.a":"colwise","layers.*.q_porj":"colwise"}"#).unwrap();
    let partition = Partition::new(&checkpoint, &ModelConfig::default(), &rules, &Setup::default()).unwrap();
    assert_eq!(partition.unused().collect::<Vec<_>>(), ["layers.*.q_porj"]);
    assert_eq!(partition.unused_of_caller(), ["layers.*.q_porj"]);

    // Packed experts are rules for several names, of which files have one; words about activations may be for no tensor.
    let model = model(&[("layers.0.mlp.experts.0.w1", &[4, 4])]);
    let plan = r#"{"layers.*.mlp.experts.gate_up_proj":"packed_colwise","layers.*.mlp.experts.down_proj":"rowwise",
                   "layers.*.mlp.experts":"moe_tp_experts","layers.*.mlp.w1s":"grouped_gemm"}"#;
    let (checkpoint, rules) = (model.checkpoint(), Rules::parse(plan).unwrap());
    let partition = Partition::new(&checkpoint, &ModelConfig::default(), &rules, &Setup::default()).unwrap();
    assert_eq!(partition.unused_of_caller(), ["layers.*.mlp.experts.down_proj", "layers.*.mlp.w1s"]);
}

#[test]
fn an_unknown_word_lists_the_known() {
    let error = Rules::parse(r#"{"layers.*.a":"colwise","layers.*.b":"sideways"}"#).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "\"layers.*.b\": \"sideways\" is none of colwise, colwise_rep, colwise_gather_output, "
        ),
        "{error}"
    );
    assert!(error.contains("grouped_gemm") && error.ends_with("ep_dispatch_experts"), "{error}");
}
