//! A small model in the shape of a Llama, and the parts of it that ranks want.

use std::collections::BTreeMap;
use std::sync::Arc;

use safetensors::tensor::{Dtype, TensorView, serialize};
use tensorhaul::assembly::Source;
use tensorhaul::{Assembled, Assembly, DeviceId, Model, Part, Slice};

const LAYERS: usize = 3;

/// Two files with rows of odd lengths, several staging buffers long.
pub(crate) fn files() -> Vec<(String, Arc<[u8]>)> {
    let (hidden, inner, vocab) = (250, 700, 1001);
    let mut files = Vec::new();
    for (number, layers) in [0..1, 1..LAYERS].into_iter().enumerate() {
        let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
        for layer in layers {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![hidden / 2, hidden]),
                ("self_attn.v_proj", vec![hidden / 2, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("mlp.gate_proj", vec![inner, hidden]),
                ("mlp.up_proj", vec![inner, hidden]),
                ("mlp.down_proj", vec![hidden, inner]),
            ] {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        if number == 0 {
            tensors.push(("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]));
            tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
        }
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .enumerate()
            .map(|(salt, (_, shape))| {
                let len = shape.iter().product::<usize>() * 2;
                (0..len).map(|at| (((at + 77 * (salt + number)) * 2_654_435_761) >> 13) as u8).collect()
            })
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
            (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap())
        });
        let file = serialize(views, None).unwrap();
        files.push((format!("model-{number}.safetensors"), file.into()));
    }
    files
}

/// Cuts at random places, by a seed: each rank has its part, and all have everything together.
pub(crate) fn assemblies(model: &Model, size: usize, seed: u64) -> Vec<Assembly> {
    let mut dice = seed;
    let mut ranks = vec![Assembly::default(); size];
    for tensor in model.checkpoint().tensors() {
        let (name, shape) = (tensor.info.name, tensor.info.shape);
        // The parts of k and v go into one tensor with those of q.
        if name.contains("k_proj") || name.contains("v_proj") {
            continue;
        }
        let dim = match name {
            _ if name.contains("norm") => None,
            _ if name.contains("o_proj") || name.contains("down_proj") => Some(1),
            _ => Some(0),
        };
        let members: Vec<String> = match name.contains("q_proj") {
            true => ["q", "k", "v"]
                .iter()
                .map(|letter| name.replace("q_proj", &format!("{letter}_proj")))
                .collect(),
            false => vec![name.to_owned()],
        };
        let cuts: Vec<Vec<u64>> = members
            .iter()
            .map(|member| {
                let len = model.checkpoint().find(member).unwrap().info.shape[dim.unwrap_or(0)];
                let mut cuts: Vec<u64> = (1..size).map(|_| roll(&mut dice) % (len + 1)).collect();
                cuts.extend([0, len]);
                cuts.sort_unstable();
                cuts
            })
            .collect();
        for (rank, assembly) in ranks.iter_mut().enumerate() {
            let (mut parts, mut rows) = (Vec::new(), 0);
            let mut whole = shape.to_vec();
            for (member, cuts) in members.iter().zip(&cuts) {
                let stored = model.checkpoint().find(member).unwrap();
                let mut ranges: Vec<_> = stored.info.shape.iter().map(|len| 0..*len).collect();
                if let Some(dim) = dim {
                    ranges[dim] = cuts[rank]..cuts[rank + 1];
                    whole[dim] = if rows == 0 { 0 } else { whole[dim] } + cuts[rank + 1] - cuts[rank];
                }
                if ranges.iter().any(std::ops::Range::is_empty) {
                    continue;
                }
                let mut at = tensorhaul::Dims::from_elem(0, shape.len());
                at[0] = rows;
                rows += ranges[0].end - ranges[0].start;
                parts.push(Part { source: Source::Stored(stored.id), slice: Slice::new(ranges), at });
            }
            if parts.is_empty() {
                continue;
            }
            if dim == Some(0) {
                whole[0] = rows;
            }
            let name = name.replace("q_proj", "qkv_proj");
            assembly.tensors.push(Assembled {
                name,
                shape: whole.into(),
                device: DeviceId::Host,
                parts: parts.into(),
            });
        }
    }
    ranks
}

/// The bytes of every tensor of a rank, by the slices of an unshared load.
pub(crate) fn expected(model: &Model, assembly: &Assembly) -> BTreeMap<String, Vec<u8>> {
    let bytes_of = |part: &Part| {
        let Source::Stored(id) = part.source else { unreachable!("nothing is dequantized") };
        let name = model.checkpoint().tensor(id).info.name;
        model.slice(name, &part.slice).unwrap().to_host().unwrap()
    };
    // Members of one tensor lie under each other, so their bytes follow each other.
    let tensors = assembly.tensors.iter();
    tensors.map(|tensor| (tensor.name.clone(), tensor.parts.iter().flat_map(bytes_of).collect())).collect()
}

/// # Source
/// Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014.
fn roll(dice: &mut u64) -> u64 {
    *dice = dice.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *dice;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
