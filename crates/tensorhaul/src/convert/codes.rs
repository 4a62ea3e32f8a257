//! Which tensors are quantized codes, and which scale them, as far as names and dtypes tell.

use std::collections::HashMap;

use tensorhaul_plan::{Dtype, DtypeKind, TensorInfo};

/// Which tensors are quantized codes, and which scale them, as far as names and dtypes tell.
///
/// Codes and scales belong together when they are in one module (`m.weight` and `m.weight_scale`, `m.qweight`
/// and `m.scales`), or when the scales are in a module that has the codes' name (`m.weight.absmax`). Where this
/// is wrong, it keeps too much: a tensor stays as it is stored, and the report says so.
pub(super) struct Quantized<'m> {
    /// A scale of each module that has one.
    scales: HashMap<&'m str, &'m str>,
    /// Codes, by their own name and by their module's.
    codes: HashMap<&'m str, &'m str>,
}

impl<'m> Quantized<'m> {
    pub(super) fn find(tensors: impl Iterator<Item = TensorInfo<'m>>) -> Quantized<'m> {
        let mut quantized = Quantized { scales: HashMap::new(), codes: HashMap::new() };
        for tensor in tensors {
            let (module, _) = split(tensor.name);
            if is_scale(tensor.name) {
                quantized.scales.entry(module).or_insert(tensor.name);
            } else if is_code(tensor.dtype) {
                quantized.codes.entry(module).or_insert(tensor.name);
                quantized.codes.insert(tensor.name, tensor.name);
            }
        }
        quantized
    }

    /// Returns why a floating-point tensor cannot be cast by itself, if it cannot.
    pub(super) fn why_kept(&self, tensor: &TensorInfo<'_>) -> Option<String> {
        if tensor.dtype.bits() < 8 {
            return Some("codes of less than a byte are numbers only with their scale".to_owned());
        }
        let (module, _) = split(tensor.name);
        if is_scale(tensor.name) {
            let codes = self.codes.get(module)?;
            return Some(format!("it belongs to {codes:?}, which is quantized"));
        }
        let scale = self.scales.get(module).or_else(|| self.scales.get(tensor.name));
        let scale = scale.filter(|_| is_code(tensor.dtype))?;
        Some(format!("it is quantized, and without {scale:?} its codes are other numbers"))
    }
}

fn is_code(dtype: Dtype) -> bool {
    match dtype.kind() {
        DtypeKind::Float => dtype.bits() <= 8,
        DtypeKind::Signed | DtypeKind::Unsigned => dtype.bits() <= 32,
        _ => false,
    }
}

fn is_scale(name: &str) -> bool {
    let (_, leaf) = split(name);
    let leaf = leaf.to_ascii_lowercase();
    SCALE_WORDS.iter().any(|word| leaf.contains(word)) || SCALE_NAMES.contains(&leaf.as_str())
}

/// A tensor's module, and its name in there.
fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('.').unwrap_or(("", name))
}

/// What is in the names of tensors that turn codes into numbers.
///
/// # Source
/// `scale`, `weight_scale(_inv)`, `scales`, `scale_weight`, `zero_point`, `qzeros`: vLLM, compressed-tensors,
/// AutoGPTQ, AutoAWQ, HQQ. `absmax`, `quant_map`, `quant_state`, `SCB`: bitsandbytes.
const SCALE_WORDS: [&str; 6] = ["scale", "zero", "absmax", "quant_map", "quant_state", "scb"];

/// MLX calls what it adds to `q * scale` so; a plain layer has one `bias`.
const SCALE_NAMES: [&str; 2] = ["biases", "qbiases"];

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, dtype: Dtype) -> TensorInfo<'_> {
        TensorInfo { name, dtype, shape: &[], data_offsets: (0, 0) }
    }

    /// Says for each tensor whether it may be cast.
    fn cast_of(tensors: &[(&str, Dtype)]) -> Vec<bool> {
        let infos = || tensors.iter().map(|(name, dtype)| info(name, *dtype));
        let quantized = Quantized::find(infos());
        infos().map(|info| quantized.why_kept(&info).is_none()).collect()
    }

    #[test]
    fn codes_and_their_scales_stay_and_what_is_beside_them_is_cast() {
        use Dtype::*;
        let fp8 =
            [("m.0.weight", F8E4m3), ("m.0.weight_scale_inv", F32), ("m.0.bias", Bf16), ("m.1.weight", Bf16)];
        assert_eq!(cast_of(&fp8), [false, false, true, true]);
        assert_eq!(cast_of(&[("m.w", F8E4m3), ("n.weight_scale", F32)]), [true, true]);
        let gptq = [("m.qweight", I32), ("m.qzeros", I32), ("m.scales", F16), ("m.bias", F16)];
        assert_eq!(cast_of(&gptq)[2..], [false, true]);
        let bitsandbytes = [("m.weight", U8), ("m.weight.absmax", F32), ("m.weight.quant_map", F32)];
        assert_eq!(cast_of(&bitsandbytes)[1..], [false, false]);
        assert_eq!(cast_of(&[("weight", F8E5m2), ("scale", F32)]), [false, false]);
        assert_eq!(
            cast_of(&[("experts.up_blocks", U8), ("experts.up_scales", F8E8m0), ("experts.up_bias", Bf16)])
                [1..],
            [false, true]
        );
        assert_eq!(
            cast_of(&[("m.weight", U32), ("m.scales", Bf16), ("m.biases", Bf16)])[1..],
            [false, false]
        );
        assert_eq!(cast_of(&[("m.weight", F4)]), [false]);
    }

    #[test]
    fn names_that_only_sound_like_scales_are_cast() {
        use Dtype::*;
        let clip = [
            ("logit_scale", F32),
            ("position_ids", I64),
            ("block.layer_scale.gamma", F32),
            ("block.w", Bf16),
        ];
        assert_eq!(cast_of(&clip), [true; 4]);
    }
}
