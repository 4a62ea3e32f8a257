//! Sharing layers out among devices by what is free on each.

use std::collections::{BTreeMap, HashMap};

use super::{DeviceMap, DeviceMapError};
use crate::placement::{DeviceId, lifetime_groups};

impl DeviceMap {
    /// Shares tensors out among devices: layers whole and in their order, neighbours on the same device, each device filled in proportion to what
    /// is free on it, less one part in [`AUTO_RESERVE_ONE_IN`], which is left for what runs there.
    ///
    /// `sizes` are the tensors of the result with their bytes. What is in no layer goes to the first device (embeddings), or to the last where
    /// its name says that it comes after the layers (`norm`, `lm_head`, `score`). A head that is tied to the embeddings is stored once,
    /// under their name: it is on the first device, and whoever computes with it on the last copies it there.
    ///
    /// # Errors
    /// [`DeviceMapError::DoesNotFit`] with the numbers; [`DeviceMapError::NoDevices`] and [`DeviceMapError::DeviceTwice`] for `free`, and
    /// [`DeviceMapError::Empty`] without tensors.
    pub fn auto<'n>(
        sizes: impl IntoIterator<Item = (&'n str, u64)>,
        free: &[(DeviceId, u64)],
    ) -> Result<DeviceMap, DeviceMapError> {
        let Sorted { first, layers, last } = Sorted::new(sizes);
        let room: Vec<_> =
            free.iter().map(|(device, bytes)| (*device, bytes - bytes / AUTO_RESERVE_ONE_IN)).collect();
        let &[(front, _), ..] = room.as_slice() else { return Err(DeviceMapError::NoDevices) };
        super::check_devices("auto", &room.iter().map(|(device, _)| *device).collect::<Vec<_>>())?;
        let back = room[room.len() - 1].0;
        let lens: Vec<u64> = layers.iter().map(|layer| layer.len_bytes).collect();
        let ends = Ends { first_bytes: first.len_bytes(), last_bytes: last.len_bytes() };
        let Some(counts) = share(&lens, &ends, &room) else {
            return Err(does_not_fit(&first, &layers, &last, room));
        };
        let mut entries: Vec<_> =
            first.names.iter().map(|(name, _)| ((*name).to_owned(), vec![front])).collect();
        let mut layers = layers.into_iter();
        for ((device, _), count) in room.iter().zip(counts) {
            entries.extend(layers.by_ref().take(count).map(|layer| (layer.module.to_owned(), vec![*device])));
        }
        entries.extend(last.names.iter().map(|(name, _)| ((*name).to_owned(), vec![back])));
        DeviceMap::new(entries)
    }
}

/// Tensors by where they are in a model.
struct Sorted<'n> {
    first: Unlayered<'n>,
    layers: Vec<Layer<'n>>,
    last: Unlayered<'n>,
}

struct Layer<'n> {
    module: &'n str,
    len_bytes: u64,
}

/// Tensors of no layer.
#[derive(Default)]
struct Unlayered<'n> {
    names: Vec<(&'n str, u64)>,
}

impl Unlayered<'_> {
    fn len_bytes(&self) -> u64 {
        self.names.iter().map(|(_, len_bytes)| len_bytes).sum()
    }
}

impl<'n> Sorted<'n> {
    fn new(sizes: impl IntoIterator<Item = (&'n str, u64)>) -> Sorted<'n> {
        let (mut first, mut last) = (Unlayered::default(), Unlayered::default());
        // Stacks of layers (of an encoder, of a decoder) in the order in which they appear, each layer by its number.
        let mut stack_of = HashMap::new();
        let mut stacks: Vec<BTreeMap<(u64, &str), u64>> = Vec::new();
        for (name, len_bytes) in sizes {
            // The outermost number counts layers; what is inside (experts) stays together.
            let Some(module) = lifetime_groups(name).last() else {
                let unlayered = if comes_last(name) { &mut last } else { &mut first };
                unlayered.names.push((name, len_bytes));
                continue;
            };
            let (stack, number) = module.rsplit_once('.').unwrap_or(("", module));
            let index = *stack_of.entry(stack).or_insert(stacks.len());
            if index == stacks.len() {
                stacks.push(BTreeMap::new());
            }
            // A number beyond u64 is no layer's; it sorts behind them all.
            *stacks[index].entry((number.parse().unwrap_or(u64::MAX), module)).or_default() += len_bytes;
        }
        let layers = stacks.into_iter().flatten();
        let layers = layers.map(|((_, module), len_bytes)| Layer { module, len_bytes }).collect();
        Sorted { first, layers, last }
    }
}

/// Tells whether a tensor that is in no layer comes after the layers, by the words of its name.
fn comes_last(name: &str) -> bool {
    let is_embedding = |part: &str| part.contains("embed") && part != "embed_out";
    let is_late = |part: &str| LATE.contains(&part) || part.ends_with("norm");
    let mut parts = name.split('.');
    !parts.clone().any(is_embedding) && parts.any(is_late)
}

/// Bytes that have to be with the first device, and with the last.
struct Ends {
    first_bytes: u64,
    last_bytes: u64,
}

/// Returns how many layers each device takes, so that the fullest by its room is as empty as can be; `None` when there is no way.
fn share(lens: &[u64], ends: &Ends, room: &[(DeviceId, u64)]) -> Option<Vec<usize>> {
    // The more of its room each may use, the more fit: the least part with which all do is found by halving.
    let (mut too_little, mut enough) = (0, PARTS);
    let mut best = fill(lens, ends, room, PARTS)?;
    while enough - too_little > 1 {
        let parts = u64::midpoint(too_little, enough);
        match fill(lens, ends, room, parts) {
            Some(counts) => (best, enough) = (counts, parts),
            None => too_little = parts,
        }
    }
    Some(best)
}

/// Fills one device after the other, each up to so many [`PARTS`] of its room.
fn fill(lens: &[u64], ends: &Ends, room: &[(DeviceId, u64)], parts: u64) -> Option<Vec<usize>> {
    let mut rest = lens;
    let mut counts = Vec::with_capacity(room.len());
    for (index, (_, room_bytes)) in room.iter().enumerate() {
        let limit_bytes = u128::from(*room_bytes) * u128::from(parts) / u128::from(PARTS);
        let (is_first, is_last) = (index == 0, index + 1 == room.len());
        let mut filled = u128::from(if is_first { ends.first_bytes } else { 0 });
        filled += u128::from(if is_last { ends.last_bytes } else { 0 });
        if filled > limit_bytes {
            return None;
        }
        let fits = |len_bytes: &&u64| {
            filled += u128::from(**len_bytes);
            filled <= limit_bytes
        };
        let count = rest.iter().take_while(fits).count();
        counts.push(count);
        rest = &rest[count..];
    }
    rest.is_empty().then_some(counts)
}

fn does_not_fit(
    first: &Unlayered<'_>,
    layers: &[Layer<'_>],
    last: &Unlayered<'_>,
    room: Vec<(DeviceId, u64)>,
) -> DeviceMapError {
    let ends = [("what comes before the layers", first), ("what comes after the layers", last)];
    let ends = ends.map(|(what, tensors)| (tensors.len_bytes(), what));
    let units = ends.into_iter().chain(layers.iter().map(|layer| (layer.len_bytes, layer.module)));
    let needed_bytes = units.clone().map(|(len_bytes, _)| len_bytes).sum();
    let (largest_bytes, largest) = units.max().unwrap_or_default();
    DeviceMapError::DoesNotFit { needed_bytes, largest_bytes, largest: largest.to_owned(), room }
}

/// One part in so many of what is free on a device is left free by [`DeviceMap::auto`]: activations and caches come after the weights, and a tenth is
/// what Accelerate leaves.
pub const AUTO_RESERVE_ONE_IN: u64 = 10;

/// Names of what comes after the layers in common architectures, besides what ends in `norm`.
const LATE: &[&str] =
    &["lm_head", "head", "embed_out", "output", "score", "classifier", "ln_f", "norm_f", "final_layernorm"];

/// A device's room is used in steps of one part in so many: fine enough for a layer of a thousandth.
const PARTS: u64 = 1 << 16;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cuda(free: &[u64]) -> Vec<(DeviceId, u64)> {
        (0..).map(DeviceId::Cuda).zip(free.iter().copied()).collect()
    }

    fn llama(layers: u64) -> Vec<(String, u64)> {
        let mut sizes = vec![("lm_head.weight".to_owned(), 40), ("model.embed_tokens.weight".to_owned(), 40)];
        for layer in 0..layers {
            sizes.push((format!("model.layers.{layer}.mlp.w"), 70));
            sizes.push((format!("model.layers.{layer}.input_layernorm.weight"), 30));
        }
        sizes.push(("model.norm.weight".to_owned(), 1));
        sizes
    }

    fn auto(sizes: &[(String, u64)], free: &[u64]) -> Result<DeviceMap, DeviceMapError> {
        DeviceMap::auto(sizes.iter().map(|(name, len)| (name.as_str(), *len)), &cuda(free))
    }

    fn device(map: &DeviceMap, name: &str) -> DeviceId {
        let devices = map.devices_of(name).unwrap();
        assert_eq!(devices.len(), 1);
        devices[0]
    }

    #[test]
    fn layers_are_shared_out_by_what_is_free_and_the_ends_go_to_the_ends() {
        let sizes = llama(12);
        let map = auto(&sizes, &[2000, 2000]).unwrap();
        let of_layer = |layer: u64| device(&map, &format!("model.layers.{layer}.mlp.w"));
        let on_first = (0..12).filter(|layer| of_layer(*layer) == DeviceId::Cuda(0)).count();
        assert_eq!(on_first, 6, "ten would be last if numbers were words");
        assert_eq!(of_layer(5), DeviceId::Cuda(0));
        assert_eq!(of_layer(6), DeviceId::Cuda(1));
        assert_eq!(device(&map, "model.embed_tokens.weight"), DeviceId::Cuda(0));
        assert_eq!(device(&map, "model.norm.weight"), DeviceId::Cuda(1));
        assert_eq!(device(&map, "lm_head.weight"), DeviceId::Cuda(1));
        let names = || sizes.iter().map(|(name, _)| name.as_str());
        assert_eq!(map.check(names(), names()), Ok(()));
        // Three times the room, three times the layers.
        let map = auto(&sizes, &[3000, 1000]).unwrap();
        let on_first =
            (0..12).filter(|layer| device(&map, &format!("model.layers.{layer}.mlp.w")) == DeviceId::Cuda(0));
        assert_eq!(on_first.count(), 9);
    }

    #[test]
    fn what_does_not_fit_says_so_with_numbers() {
        let error = auto(&llama(12), &[700, 600]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "1281 bytes in whole layers (the largest is \"model.layers.9\", 100 bytes) do not fit: cuda:0 takes 630, cuda:1 takes 540"
        );
        // In bytes it would fit; in whole layers it does not.
        assert!(auto(&llama(4), &[200, 200, 100, 100]).is_err());
        assert_eq!(auto(&llama(1), &[]).unwrap_err(), DeviceMapError::NoDevices);
        let twice = [(DeviceId::Cuda(0), 1000), (DeviceId::Cuda(0), 1000)];
        let error = DeviceMap::auto([("a", 1)], &twice).unwrap_err();
        assert!(matches!(error, DeviceMapError::DeviceTwice { .. }));
    }

    #[test]
    fn names_tell_what_comes_after_the_layers() {
        let late = [
            "lm_head.weight",
            "model.norm.weight",
            "transformer.ln_f.bias",
            "score.weight",
            "embed_out.weight",
        ];
        let early = [
            "model.embed_tokens.weight",
            "transformer.wte.weight",
            "bert.embeddings.LayerNorm.weight",
            "visual.conv1.weight",
        ];
        assert!(late.into_iter().all(comes_last));
        assert!(!early.into_iter().any(comes_last));
    }

    proptest! {
        #[test]
        fn every_tensor_is_on_one_device_layers_stay_whole_and_nobody_is_too_full(
            layers in prop::collection::vec(prop::collection::vec(0u64..1000, 1..4), 0..40),
            ends in prop::array::uniform2(0u64..2000),
            free in prop::collection::vec(0u64..20_000, 1..6),
        ) {
            let mut sizes = vec![("model.embed.weight".to_owned(), ends[0]), ("lm_head.weight".to_owned(), ends[1])];
            for (layer, tensors) in layers.iter().enumerate() {
                sizes.extend(tensors.iter().enumerate().map(|(at, len)| (format!("h.{layer}.t{at}"), *len)));
            }
            let Ok(map) = auto(&sizes, &free) else {
                // Whoever says that it does not fit is right at least where all room together is too little, or one
                // device alone would have had room for everything.
                let all: u64 = sizes.iter().map(|(_, len)| len).sum();
                prop_assert!(free.len() > 1 || all > free[0] - free[0] / AUTO_RESERVE_ONE_IN);
                return Ok(());
            };
            let mut used = vec![0u64; free.len()];
            let mut last_ordinal = 0;
            for (layer, tensors) in layers.iter().enumerate() {
                let on: Vec<_> = (0..tensors.len()).map(|at| device(&map, &format!("h.{layer}.t{at}"))).collect();
                prop_assert!(on.iter().all(|device| *device == on[0]), "layer {layer} is split");
                let DeviceId::Cuda(ordinal) = on[0] else { panic!("a device that was not given") };
                prop_assert!(ordinal >= last_ordinal, "layer {layer} is on a device before its neighbour's");
                last_ordinal = ordinal;
            }
            for (name, len) in &sizes {
                let DeviceId::Cuda(ordinal) = device(&map, name) else { panic!("a device that was not given") };
                used[ordinal as usize] += len;
            }
            for (used, free) in used.iter().zip(&free) {
                prop_assert!(*used <= free - free / AUTO_RESERVE_ONE_IN);
            }
        }
    }
}
