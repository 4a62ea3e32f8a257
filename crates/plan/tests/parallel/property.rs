//! What every rank has of tiny models of every architecture, against a computation on whole tensors that knows nothing of rules: heads and features
//! chunked by name.

use std::collections::BTreeMap;

use tensorhaul_plan::assembly::Source;
use tensorhaul_plan::parallel::{Fuse, ModelConfig, Partition, Ranks, Rules, Setup, Share};
use tensorhaul_plan::quant::{Group, Quantization};
use tensorhaul_plan::{Checkpoint, DeviceId, Dtype, Slice};

use crate::golden::{all, recognize};
use crate::models::{self, Model, Sizes, TINY, Tensor};

/// A tensor whose elements are their own flat indices in the source they are from, and the source.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Array {
    shape: Vec<u64>,
    data: Vec<(Source, u64)>,
}

impl Array {
    fn new(source: Source, shape: &[u64]) -> Array {
        let numel = shape.iter().product::<u64>();
        Array { shape: shape.to_vec(), data: (0..numel).map(|flat| (source, flat)).collect() }
    }

    /// Keeps a range of a dimension.
    fn narrow(&self, dim: usize, start: u64, len: u64) -> Array {
        let inner: u64 = self.shape[dim + 1..].iter().product();
        let outer: u64 = self.shape[..dim].iter().product();
        let mut data = Vec::new();
        for block in 0..outer {
            let first = (block * self.shape[dim] + start) * inner;
            data.extend_from_slice(&self.data[first as usize..(first + len * inner) as usize]);
        }
        let mut shape = self.shape.clone();
        shape[dim] = len;
        Array { shape, data }
    }

    /// One of `count` equal parts of a dimension.
    fn chunk(&self, dim: usize, part: u64, count: u64) -> Array {
        let len = self.shape[dim] / count;
        assert_eq!(len * count, self.shape[dim]);
        self.narrow(dim, part * len, len)
    }

    /// One part of each of several sections of dimension 0, one after the other.
    fn sections(&self, lens: &[u64], parts: &[(u64, u64)]) -> Array {
        let mut start = 0;
        let of = |(len, (part, count)): (&u64, &(u64, u64))| {
            let section = self.narrow(0, start, *len).chunk(0, *part, *count);
            start += len;
            section
        };
        concat(&lens.iter().zip(parts).map(of).collect::<Vec<_>>())
    }
}

/// Rows one after the other.
fn concat(arrays: &[Array]) -> Array {
    let mut shape = arrays[0].shape.clone();
    shape[0] = arrays.iter().map(|array| array.shape[0]).sum();
    Array { shape, data: arrays.iter().flat_map(|array| array.data.iter().copied()).collect() }
}

/// The last dimensions of arrays of three, one after the other.
fn beside(arrays: &[Array; 2]) -> Array {
    let [rows, cols] = [arrays[0].shape[0] * arrays[0].shape[1], arrays[0].shape[2]].map(|n| n as usize);
    let row = |row: usize| arrays.iter().flat_map(move |array| &array.data[row * cols..(row + 1) * cols]);
    let data = (0..rows).flat_map(row).copied().collect();
    Array { shape: vec![arrays[0].shape[0], arrays[0].shape[1], 2 * cols as u64], data }
}

/// A new first dimension.
fn stack(arrays: &[Array]) -> Array {
    let shape = [&[arrays.len() as u64], arrays[0].shape.as_slice()].concat();
    Array { shape, data: arrays.iter().flat_map(|array| array.data.iter().copied()).collect() }
}

/// What a rank should have, by name.
struct Expected<'s> {
    sizes: &'s Sizes,
    tp: (u64, u64),
    stage: (u64, u64),
    ep: (u64, u64),
    is_tied: bool,
}

impl Expected<'_> {
    /// Tells whether the rank's stage and experts have a tensor: layers dealt as the stages' documentation says.
    fn has(&self, name: &str) -> bool {
        let (stage, stages) = self.stage;
        let words: Vec<&str> = name.split('.').collect();
        let number_behind = |word: &str| {
            let at = words.iter().position(|own| *own == word)?;
            words.get(at + 1)?.parse::<u64>().ok()
        };
        if let Some(expert) = number_behind("experts") {
            let each = self.sizes.experts / self.ep.1;
            if expert / each != self.ep.0 {
                return false;
            }
        }
        let is_vision = ["vision", "visual", "model.visual"].iter().any(|part| name.starts_with(part));
        if let Some(layer) = number_behind("layers").or(number_behind("layer")).filter(|_| !is_vision) {
            let mut lens = vec![self.sizes.layers / stages; stages as usize];
            for extra in 0..self.sizes.layers % stages {
                lens[(stages - 2 - extra) as usize] += 1;
            }
            let owner = (0..stages).find(|stage| layer < lens[..=*stage as usize].iter().sum());
            return stage == owner.unwrap_or(stages - 1);
        }
        let is_embedding = ["embed_tokens", "embed_in", "embeddings"].iter().any(|word| words.contains(word));
        let is_word_embedding =
            name.ends_with("embed_tokens.weight") || name.ends_with("word_embeddings.weight");
        match is_embedding || is_vision || name.starts_with("multi_modal") {
            true => stage == 0 || self.is_tied && is_word_embedding && stage == stages - 1,
            false => stage == stages - 1,
        }
    }

    /// Returns the rank's part of a tensor, or nothing where it has none.
    fn of(&self, name: &str, whole: &Array) -> Option<Array> {
        if !self.has(name) {
            return None;
        }
        let (rank, size) = self.tp;
        let is_bias = name.ends_with(".bias") || name.ends_with("_bias");
        let module = name.trim_end_matches(".weight").trim_end_matches(".bias").trim_end_matches("_bias");
        let last = module.rsplit('.').next().unwrap();
        let heads = (rank, size);
        let kv_heads = match self.sizes.kv_heads < size {
            true => (rank * self.sizes.kv_heads / size, self.sizes.kv_heads),
            false => heads,
        };
        let is_stack = last == "gate_up_proj" && name.contains("experts")
            || last == "down_proj" && whole.shape.len() == 3
            || name.ends_with("down_proj_bias");
        let whole = if is_stack { &whole.chunk(0, self.ep.0, self.ep.1) } else { whole };
        let first = usize::from(is_stack);
        // BF16 exports of gpt-oss are [experts, in, out].
        let is_made = whole.data.first().is_some_and(|(source, _)| matches!(source, Source::Made(_)));
        let (out, input) =
            if is_stack && !is_made && !is_bias { (first + 1, first) } else { (first, first + 1) };
        Some(match last {
            _ if name.contains("visual") => whole.clone(),
            "q_proj" | "q_b_proj" | "kv_b_proj" | "query_key_value" | "sinks" | "query" | "key" | "value" => {
                whole.chunk(0, heads.0, heads.1)
            }
            "k_proj" | "v_proj" => whole.chunk(0, kv_heads.0, kv_heads.1),
            "q_norm" if whole.shape[0] > self.sizes.head_dim => whole.chunk(0, heads.0, heads.1),
            "k_norm" if whole.shape[0] > self.sizes.head_dim => whole.chunk(0, kv_heads.0, kv_heads.1),
            "qkv_proj" => {
                let [q, kv] =
                    [self.sizes.heads, self.sizes.kv_heads].map(|heads| heads * self.sizes.head_dim);
                whole.sections(&[q, kv, kv], &[heads, kv_heads, kv_heads])
            }
            "gate_up_proj" if name.contains("feed_forward") => {
                let halves = [whole.chunk(out, 0, 2), whole.chunk(out, 1, 2)];
                beside(&halves.map(|half| half.chunk(out, rank, size)))
            }
            "gate_up_proj" if first == 0 => whole.sections(&[whole.shape[0] / 2; 2], &[heads; 2]),
            "gate_proj" | "up_proj" | "w1" | "w3" | "dense_h_to_4h" | "gate_up_proj" => {
                whole.chunk(out, rank, size)
            }
            "dense" if module.ends_with("intermediate.dense") => whole.chunk(0, rank, size),
            "o_proj" | "down_proj" | "w2" | "dense_4h_to_h" | "dense"
                if !module.starts_with("pooler") && !module.starts_with("cls") =>
            {
                match is_bias {
                    true if rank > 0 => return None,
                    true => whole.clone(),
                    false => whole.chunk(input, rank, size),
                }
            }
            "embed_tokens" | "lm_head" | "embed_in" | "embed_out" | "word_embeddings" | "head"
            | "predictions" => {
                let padded =
                    (1..).map(|times| times * 64).find(|rows| *rows >= whole.shape[0] && rows % size == 0);
                let each: u64 = padded.unwrap() / size;
                let start = (rank * each).min(whole.shape[0]);
                whole.narrow(0, start, each.min(whole.shape[0] - start))
            }
            _ => whole.clone(),
        })
    }
}

/// Puts a share together, part by part, and checks that the parts of each tensor are disjoint and cover it.
fn execute(checkpoint: &Checkpoint, groups: &[Group], share: &Share) -> BTreeMap<String, Array> {
    let mut arrays = BTreeMap::new();
    for tensor in &share.assembly.tensors {
        let numel = tensor.shape.iter().product::<u64>() as usize;
        let mut data = vec![None; numel];
        for part in &tensor.parts {
            let whole = match part.source {
                Source::Stored(id) => checkpoint.tensor(id).info.shape,
                Source::Made(group) => &groups[group as usize].shape,
            };
            let mut cut = Array::new(part.source, whole);
            for (dim, (start, len)) in ranges(&part.slice).into_iter().enumerate() {
                cut = cut.narrow(dim, start, len);
            }
            let behind = tensor.shape.len() - cut.shape.len();
            assert!(behind <= 1 && part.at.len() == tensor.shape.len());
            for (flat, element) in cut.data.iter().enumerate() {
                let mut rest = flat as u64;
                let mut index = part.at.clone();
                for (dim, len) in cut.shape.iter().enumerate().rev() {
                    index[dim + behind] += rest % len;
                    rest /= len;
                }
                let place = index.iter().zip(&tensor.shape).fold(0, |place, (index, len)| {
                    assert!(index < len, "{}: {index} of {:?}", tensor.name, tensor.shape);
                    place * len + index
                });
                let old = data[place as usize].replace(*element);
                assert_eq!(old, None, "{}: parts overlap", tensor.name);
            }
        }
        let data = data.into_iter().collect::<Option<Vec<_>>>();
        let array = Array { shape: tensor.shape.to_vec(), data: data.expect("parts cover the tensor") };
        assert_eq!(arrays.insert(tensor.name.clone(), array), None, "{} is there twice", tensor.name);
    }
    arrays
}

fn ranges(slice: &Slice) -> Vec<(u64, u64)> {
    slice.ranges().iter().map(|range| (range.start, range.stop - range.start)).collect()
}

/// Every architecture, tiny; with fewer KV heads where there are such models.
pub(crate) fn zoo() -> Vec<(Model, Sizes)> {
    let grouped = |kv_heads| Sizes { kv_heads, ..TINY };
    let wide = Sizes { hidden: 32, moe_intermediate: 96, block: 32, ..TINY };
    let blocks = Sizes { nope: 2, hidden: 12, q_lora: 8, block: 2, ..TINY };
    let llama = |architecture: &str, sizes: Sizes| (models::llama(architecture, &sizes), sizes);
    let [qwen_sees, qwen3_sees] = models::qwen_vision(&grouped(2));
    vec![
        llama("LlamaForCausalLM", TINY),
        llama("LlamaForCausalLM", grouped(1)),
        llama("MistralForCausalLM", grouped(2)),
        llama("Qwen2ForCausalLM", grouped(6)),
        llama("Qwen3ForCausalLM", grouped(8)),
        llama("Gemma2ForCausalLM", grouped(12)),
        llama("Gemma3ForCausalLM", grouped(1)),
        (models::gemma3_vision(&grouped(2)), grouped(2)),
        (qwen_sees, grouped(2)),
        (qwen3_sees, grouped(2)),
        llama("SmolLM3ForCausalLM", grouped(4)),
        (models::phi3(&grouped(24)), grouped(24)),
        (models::phi3(&grouped(4)), grouped(4)),
        (models::mixtral(&grouped(2)), grouped(2)),
        (models::minimax_m2(&grouped(2)), grouped(2)),
        (models::llama4(&grouped(8)), grouped(8)),
        (models::glm4_moe(&grouped(4)), grouped(4)),
        (models::qwen_moe("Qwen2MoeForCausalLM", &TINY), TINY),
        (models::qwen_moe("Qwen3MoeForCausalLM", &grouped(4)), grouped(4)),
        (models::deepseek("DeepseekV2ForCausalLM", &TINY), TINY),
        (models::deepseek("DeepseekV3ForCausalLM", &TINY), TINY),
        (models::deepseek("DeepseekV3ForCausalLM", &blocks), blocks),
        (models::deepseek("DeepseekV32ForCausalLM", &blocks), blocks),
        (models::gpt_oss(&grouped(8)), grouped(8)),
        (models::gpt_oss(&wide), wide),
        (models::gpt_neox(&TINY), TINY),
        (models::bert("BertModel", &TINY), TINY),
        (models::bert("BertForMaskedLM", &TINY), TINY),
    ]
}

/// Sizes that share a model's heads: ranks divide KV heads, or are a multiple of them.
pub(crate) fn fits(sizes: &Sizes, tp: u64) -> bool {
    sizes.kv_heads.is_multiple_of(tp) || tp.is_multiple_of(sizes.kv_heads)
}

/// Calls `check` with the shares of all ranks, for groups of `tp` and `pp`, each with every `ep`.
fn for_all_groups(
    model: &Model,
    sizes: &Sizes,
    setup: &Setup<'_>,
    checkpoint: &Checkpoint,
    groups: &[(u64, u64)],
    mut check: impl FnMut(&Partition<'_>, &[(Share, Expected<'_>)]),
) {
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap();
    let partition = Partition::new(checkpoint, &config, &rules, setup).unwrap();
    let heads = ["lm_head.weight", "language_model.lm_head.weight", "embed_out.weight"];
    let is_tied =
        config.architectures[0] != "BertModel" && heads.iter().all(|head| checkpoint.find(head).is_none());
    let ep_sizes: &[u32] = if config.experts.is_some() { &[1, 2, 4] } else { &[1] };
    for (tp, pp) in groups.iter().copied() {
        // Stages and experts have nothing to do with one another: two numbers of stages are enough where experts are shared.
        for ep in ep_sizes.iter().copied().filter(|ep| *ep == 1 || matches!(pp, 1 | 3)) {
            if !fits(sizes, tp) {
                let error = partition
                    .share(&Ranks::alone().tp(0, tp as u32), DeviceId::Host)
                    .unwrap_err()
                    .to_string();
                assert!(
                    error.contains(&format!(
                        "{tp} ranks cannot share {} kv heads evenly; 1, 2",
                        sizes.kv_heads
                    )),
                    "{error}"
                );
                continue;
            }
            let share = |ranks: Ranks| {
                let stage = match ranks.layers {
                    tensorhaul_plan::parallel::Layers::Stage { stage, .. } => u64::from(stage),
                    _ => unreachable!("all are stages"),
                };
                let expected = Expected {
                    sizes,
                    tp: (u64::from(ranks.tp_rank), tp),
                    stage: (stage, pp),
                    ep: (u64::from(ranks.ep_rank), u64::from(ep)),
                    is_tied,
                };
                (partition.share(&ranks, DeviceId::Host).unwrap(), expected)
            };
            let shares: Vec<_> = Ranks::all(tp as u32, pp as u32, ep).map(share).collect();
            check(&partition, &shares);
        }
    }
}

/// Every size of tensor-parallel groups with every number of stages.
fn all_groups() -> Vec<(u64, u64)> {
    [1, 2, 3, 4, 8].into_iter().flat_map(|tp| (1..=4).map(move |pp| (tp, pp))).collect()
}

/// What rules see: each name with its whole tensor.
fn wholes(checkpoint: &Checkpoint, quantization: &Quantization, is_made: bool) -> BTreeMap<String, Array> {
    let mut wholes = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        if is_made && quantization.group_of(tensor.id).is_some() {
            continue;
        }
        wholes.insert(tensor.info.name.to_owned(), Array::new(Source::Stored(tensor.id), tensor.info.shape));
    }
    for (number, group) in (0..).zip(quantization.groups()).filter(|_| is_made) {
        wholes.insert(group.name.clone(), Array::new(Source::Made(number), &group.shape));
    }
    wholes
}

#[test]
fn every_rank_of_every_architecture_has_what_chunks_of_whole_tensors_give() {
    for (model, sizes) in zoo() {
        let checkpoint = model.checkpoint();
        let quantization = recognize(&checkpoint, &model);
        let dequantize = all(&quantization);
        let setup =
            Setup { quantization: Some(&quantization), dequantize: Some(&dequantize), fuse: Fuse::No };
        let wholes = wholes(&checkpoint, &quantization, true);
        for_all_groups(&model, &sizes, &setup, &checkpoint, &all_groups(), |_, shares| {
            let mut seen: BTreeMap<Source, Vec<bool>> = BTreeMap::new();
            for (share, expected) in shares {
                let found = execute(&checkpoint, quantization.groups(), share);
                let of = |(name, whole): (&String, &Array)| Some((name.clone(), expected.of(name, whole)?));
                let expected: BTreeMap<String, Array> = wholes.iter().filter_map(of).collect();
                let names = |arrays: &BTreeMap<String, Array>| arrays.keys().cloned().collect::<Vec<_>>();
                assert_eq!(names(&found), names(&expected), "{}", share.ranks);
                for (name, array) in &found {
                    assert_eq!(array, &expected[name], "{name}, {}", share.ranks);
                    for (source, flat) in &array.data {
                        let all = seen.entry(*source).or_default();
                        all.resize(all.len().max(*flat as usize + 1), false);
                        all[*flat as usize] = true;
                    }
                }
            }
            for (name, whole) in &wholes {
                let Some((source, last)) = whole.data.last() else { continue };
                let seen = &seen[source];
                assert!(
                    seen.len() as u64 == last + 1 && seen.iter().all(|seen| *seen),
                    "{name} is lost in parts"
                );
            }
        });
    }
}

#[test]
fn what_is_cut_is_on_one_rank_only_and_what_is_whole_on_all() {
    for (model, sizes) in zoo().into_iter().filter(|(_, sizes)| sizes.kv_heads == 24) {
        let checkpoint = model.checkpoint();
        let quantization = recognize(&checkpoint, &model);
        let dequantize = all(&quantization);
        let setup =
            Setup { quantization: Some(&quantization), dequantize: Some(&dequantize), fuse: Fuse::No };
        for_all_groups(
            &model,
            &sizes,
            &setup,
            &checkpoint,
            &[(1, 1), (2, 1), (3, 1), (8, 2)],
            |_, shares| {
                // Ranks of one stage and one share of the experts.
                let tp_size = shares[0].0.ranks.tp_size as usize;
                for of_stage in shares.chunks(tp_size) {
                    let mut counts: BTreeMap<(Source, u64), usize> = BTreeMap::new();
                    for (share, _) in of_stage {
                        for array in execute(&checkpoint, quantization.groups(), share).values() {
                            array.data.iter().for_each(|element| *counts.entry(*element).or_default() += 1);
                        }
                    }
                    let mut of_source: BTreeMap<Source, usize> = BTreeMap::new();
                    for ((source, flat), count) in counts {
                        assert!(
                            count == 1 || count == tp_size,
                            "{source:?} {flat} is on {count} ranks of {tp_size}"
                        );
                        let same = *of_source.entry(source).or_insert(count);
                        assert_eq!(same, count, "{source:?} is cut and whole");
                    }
                }
            },
        );
    }
}

#[test]
fn fused_tensors_are_the_rows_of_their_members_one_after_the_other() {
    for (model, sizes) in zoo() {
        let checkpoint = model.checkpoint();
        let quantization = recognize(&checkpoint, &model);
        let dequantize = all(&quantization);
        let fused =
            Setup { quantization: Some(&quantization), dequantize: Some(&dequantize), fuse: Fuse::All };
        let wholes = wholes(&checkpoint, &quantization, true);
        for_all_groups(&model, &sizes, &fused, &checkpoint, &[(1, 1), (2, 3), (8, 1)], |_, shares| {
            for (share, expected) in shares {
                let found = execute(&checkpoint, quantization.groups(), share);
                let of = |(name, whole): (&String, &Array)| Some((name.clone(), expected.of(name, whole)?));
                let mut expected: BTreeMap<String, Array> = wholes.iter().filter_map(of).collect();
                fuse(&mut expected);
                let names = |arrays: &BTreeMap<String, Array>| arrays.keys().cloned().collect::<Vec<_>>();
                assert_eq!(names(&found), names(&expected), "{}", share.ranks);
                for (name, array) in &found {
                    assert_eq!(array, &expected[name], "{name}, {}", share.ranks);
                }
            }
        });
    }
}

#[test]
fn tensors_that_are_stored_fused_are_cut_as_their_members_are() {
    for (model, sizes) in zoo() {
        let checkpoint = model.checkpoint();
        let quantization = recognize(&checkpoint, &model);
        if quantization.groups().iter().any(|group| group.is_plain_transposed) {
            continue; // Its plain copies have other shapes than the groups.
        }
        let dequantize = all(&quantization);
        let fused =
            Setup { quantization: Some(&quantization), dequantize: Some(&dequantize), fuse: Fuse::All };
        let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
        let rules = Rules::of(&config).unwrap();
        let partition = Partition::new(&checkpoint, &config, &rules, &fused).unwrap();
        let whole = partition.share(&Ranks::alone(), DeviceId::Host).unwrap();
        let whole = execute(&checkpoint, quantization.groups(), &whole);
        let stored = |(name, array): (&String, &Array)| Tensor {
            name: name.clone(),
            dtype: Dtype::Bf16,
            shape: array.shape.clone(),
        };
        let copy = Model { tensors: whole.iter().map(stored).collect(), ..model.clone() }.checkpoint();
        let of_copy = Partition::new(&copy, &config, &rules, &Setup::default()).unwrap();
        for_all_groups(
            &model,
            &sizes,
            &fused,
            &checkpoint,
            &[(1, 1), (2, 3), (3, 1), (8, 1)],
            |_, shares| {
                for (share, _) in shares {
                    let expected = execute(&checkpoint, quantization.groups(), share);
                    let mut found =
                        execute(&copy, &[], &of_copy.share(&share.ranks, DeviceId::Host).unwrap());
                    for (source, flat) in found.values_mut().flat_map(|array| &mut array.data) {
                        let Source::Stored(id) = *source else { unreachable!("the copy is not quantized") };
                        (*source, *flat) = whole[copy.tensor(id).info.name].data[*flat as usize];
                    }
                    assert!(found == expected, "{}, {}", config.architectures[0], share.ranks);
                }
            },
        );
    }
}

/// Fuses whole parts, by the names that runtimes use.
fn fuse(arrays: &mut BTreeMap<String, Array>) {
    for (members, target) in [
        (&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..], "self_attn.qkv_proj"),
        (&["self.query", "self.key", "self.value"], "self.qkv"),
        (&["mlp.gate_proj", "mlp.up_proj"], "mlp.gate_up_proj"),
        (&["feed_forward.gate_proj", "feed_forward.up_proj"], "feed_forward.gate_up_proj"),
        (&["shared_expert.gate_proj", "shared_expert.up_proj"], "shared_expert.gate_up_proj"),
        (&["shared_experts.gate_proj", "shared_experts.up_proj"], "shared_experts.gate_up_proj"),
        (&["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"], "self_attn.fused_qkv_a_proj"),
    ] {
        let firsts: Vec<String> = arrays.keys().filter(|name| name.contains(members[0])).cloned().collect();
        for first in firsts {
            let has_all =
                members.iter().all(|member| arrays.contains_key(&first.replace(members[0], member)));
            if has_all {
                let own: Vec<Array> = members
                    .iter()
                    .map(|member| arrays.remove(&first.replace(members[0], member)).unwrap())
                    .collect();
                arrays.insert(first.replace(members[0], target), concat(&own));
            }
        }
    }
    for (rows, target) in [
        (&["gate_proj", "up_proj"][..], "w13_weight"),
        (&["w1", "w3"], "w13_weight"),
        (&["down_proj"], "w2_weight"),
        (&["w2"], "w2_weight"),
    ] {
        let of_layers: Vec<String> =
            arrays.keys().filter_map(|name| Some(name.split_once(".experts.")?.0.to_owned())).collect();
        for at in of_layers {
            let experts: Vec<Array> = (0..TINY.experts)
                .filter_map(|expert| {
                    let of = |row: &&str| arrays.remove(&format!("{at}.experts.{expert}.{row}.weight"));
                    rows.iter().map(of).collect::<Option<Vec<_>>>().map(|rows| concat(&rows))
                })
                .collect();
            if !experts.is_empty() {
                arrays.insert(format!("{at}.experts.{target}"), stack(&experts));
            }
        }
    }
}

#[test]
fn scales_of_blocks_follow_their_weights_where_those_stay_as_they_are_stored() {
    // All that is cut ends at a block for 1, 2, 3, 4 ranks: 24 heads of 2 or 4, 48 and 24 features, blocks of 2.
    let sizes = Sizes { nope: 2, hidden: 12, q_lora: 8, block: 2, ..TINY };
    let model = models::deepseek("DeepseekV3ForCausalLM", &sizes);
    let checkpoint = model.checkpoint();
    let quantization = recognize(&checkpoint, &model);
    let setup = Setup { quantization: Some(&quantization), dequantize: None, fuse: Fuse::No };
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap();
    let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
    for tp in [1, 2, 3, 4] {
        for rank in 0..tp {
            let share = partition.share(&Ranks::alone().tp(rank, tp), DeviceId::Host).unwrap();
            let found = execute(&checkpoint, quantization.groups(), &share);
            assert_eq!(found.len(), checkpoint.len());
            for group in quantization.groups() {
                let [weight, scale] =
                    [&group.members[0], &group.members[1]].map(|(_, id)| checkpoint.tensor(*id).info.name);
                let (weight, scale) = (&found[weight], &found[scale]);
                // The block of each element that is kept is kept, at the place of the element's block.
                let whole_cols = (group.shape[1], group.shape[1].div_ceil(2));
                for (place, (_, flat)) in (0..).zip(&weight.data) {
                    let (row, col) = (place / weight.shape[1] / 2, place % weight.shape[1] / 2);
                    let block = flat / whole_cols.0 / 2 * whole_cols.1 + flat % whole_cols.0 / 2;
                    assert_eq!(scale.data[(row * scale.shape[1] + col) as usize].1, block, "{}", group.name);
                }
            }
        }
    }
    let error = partition.share(&Ranks::alone().tp(1, 8), DeviceId::Host).unwrap_err();
    let text = std::error::Error::source(&error).unwrap().to_string();
    assert!(text.contains("that are scaled together; cutting at "), "{text}");
}
