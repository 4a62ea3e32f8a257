"""Reads the checkpoints of the test `quantized` with the formats' own packages, and compares with what the test expects.

Usage: TENSORHAUL_KEEP_CASES=FOLDER cargo test -p tensorhaul --test quantized; quantized_cases.py FOLDER

The test packs its checkpoints itself; this shows that it packs them as the formats' writers do. Decoded by packages:
compressed-tensors 0.20.0, bitsandbytes 0.50.2, hqq 0.2.8.post1, mlx 0.32.4 (CPU), torchao 0.18.0, comfy-kitchen 0.2.40,
nvidia-modelopt 0.47.0, transformers 5.23.0 (gpt-oss), torch 2.11.0 (casts from 8-bit floats). What no package decodes on a
CPU (GPTQ, AWQ, Quark, padded words of old compressed-tensors) is decoded below, bit by bit with numpy.
"""

import json
import struct
import sys
import warnings
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

warnings.filterwarnings("ignore")
NUMPY = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8, "U8": np.uint8, "I16": np.int16, "I32": np.int32,
    "U32": np.uint32, "I64": np.int64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
TORCH = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "BF16": torch.bfloat16}
NARROW = {"F4": (4, ml_dtypes.float4_e2m1fn), "F6_E2M3": (6, ml_dtypes.float6_e2m3fn), "F6_E3M2": (6, ml_dtypes.float6_e3m2fn)}


class Checkpoint:
    """Tensors by name, as arrays, with the header's metadata and the configuration."""

    def __init__(self, folder: Path):
        self.tensors, self.dtypes, self.metadata, self.config = {}, {}, {}, {}
        for file in sorted(folder.glob("*.safetensors")):
            data = file.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            self.metadata |= header.pop("__metadata__", {})
            for name, entry in header.items():
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                self.dtypes[name] = entry["dtype"]
                self.tensors[name] = array(data[begin:end], entry["dtype"], entry["shape"])
        for file in ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"):
            if (folder / file).exists():
                config = json.loads((folder / file).read_text())
                config = config.get("text_config", config)
                for key in ("quantization_config", "compression_config", "quantization"):
                    config = config.get(key, config)
                self.config = config

    def tensor(self, name: str) -> torch.Tensor:
        values, dtype = self.tensors[name], self.dtypes[name]
        if dtype in TORCH:
            raw = torch.frombuffer(bytearray(values.tobytes()), dtype=torch.uint8)
            return raw.view(TORCH[dtype]).reshape(values.shape)
        return torch.from_numpy(values.copy())

    def part(self, module: str, part: str):
        return self.tensors.get(f"{module}.{part}")

    def below(self, module: str) -> dict[str, torch.Tensor]:
        prefix = module + "."
        return {name[len(prefix) :]: self.tensor(name) for name in self.tensors if name.startswith(prefix)}


def array(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    if not data:
        return np.empty(shape, NUMPY[dtype])
    if dtype in NARROW:
        bits, narrow = NARROW[dtype]
        return stream(np.frombuffer(data, np.uint8), bits).astype(np.uint8).view(narrow).reshape(shape)
    return np.frombuffer(data, NUMPY[dtype]).reshape(shape)


def stream(data: np.ndarray, bits: int) -> np.ndarray:
    """Codes of a dense stream along the last dimension."""
    data = np.ascontiguousarray(data).view(np.uint8)
    flat = np.unpackbits(data, axis=-1, bitorder="little")
    count = flat.shape[-1] // bits
    fields = flat[..., : count * bits].reshape(*flat.shape[:-1], count, bits)
    return (fields.astype(np.int64) << np.arange(bits)).sum(-1)


def f32(values) -> np.ndarray:
    return np.asarray(values).astype(np.float32)


# --- GPTQ ------------------------------------------------------------------------------------------------------------


def planes(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of planes along the last dimension."""
    widths = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    codes, first, shift = 0, 0, 0
    for width in widths:
        codes = codes + (stream(blocks[..., first : first + width], width) << shift)
        first, shift = first + width, shift + width
    return codes.reshape(*words.shape[:-1], -1)


def gptq(checkpoint: Checkpoint, module: str, bits: int, group_size: int, symmetric, form: str) -> np.ndarray:
    qweight, qzeros = checkpoint.part(module, "qweight"), checkpoint.part(module, "qzeros")
    scales = f32(checkpoint.part(module, "scales"))
    rows, g_idx = scales.shape[1], checkpoint.part(module, "g_idx")
    unpack = planes if form == "gptq_p" else stream
    codes = unpack(np.ascontiguousarray(qweight.T), bits)
    cols = (qweight.shape[0] * 32) // bits
    codes = codes[:, :cols]
    stored = unpack(qzeros, bits)[:, :rows]
    half = 1 << (bits - 1)
    if symmetric and np.isin(stored, (half, half - 1)).all():
        zeros = np.full_like(stored, half)
    elif form in ("gptq_v2", "gptq_p"):
        zeros = stored
    elif bits == 3:
        zeros = (stored + 1) % 8
    else:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        zeros = stream(qzeros.view(np.uint32) + np.uint32(ones), bits)[:, :rows]
    groups = np.arange(cols) // (group_size if group_size > 0 else cols)
    if g_idx is not None and g_idx.any():
        groups = g_idx
    return f32(codes - zeros[groups].T) * scales[groups].T


def decode_gptq(checkpoint: Checkpoint, module: str) -> np.ndarray:
    config = dict(checkpoint.config)
    config |= config.get("extra_config", {}).get(module, {})
    for pattern, changes in config.get("dynamic", {}).items():
        if pattern.startswith("+:") and module.endswith("down_proj"):
            config |= changes
    bits, group_size = config.get("bits", config.get("wbits")), config.get("group_size", config.get("q_group_size"))
    form = config.get("checkpoint_format", config.get("format", "gptq"))
    return gptq(checkpoint, module, bits, group_size, config.get("sym"), form)


# --- AWQ -------------------------------------------------------------------------------------------------------------


def decode_awq(checkpoint: Checkpoint, module: str) -> np.ndarray:
    config = checkpoint.config
    version = config.get("backend", config.get("version", "gemm")).lower()
    group_size = config.get("group_size", config.get("q_group_size"))
    qweight, scales = checkpoint.part(module, "qweight"), f32(checkpoint.part(module, "scales"))
    if version == "gemv":
        codes, zeros = stream(qweight, 4), stream(checkpoint.part(module, "qzeros"), 4)
        groups = np.arange(codes.shape[1]) // group_size
        return f32(codes - zeros[:, groups]) * scales[:, groups]
    if version in ("gemv_fast", "llm-awq"):
        zeros = checkpoint.part(module, "qzeros")
        zeros = f32(zeros if zeros is not None else checkpoint.part(module, "scaled_zeros"))
        codes = unpack_awq_fast(qweight)
        groups = np.arange(codes.shape[1]) // group_size
        return f32(codes) * scales[groups].T + zeros[groups].T
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # Where output column j of eight lies: AutoAWQ's AWQ_REVERSE_ORDER.
    unpack = lambda words: stream(words, 4).reshape(words.shape[0], -1, 8)[..., order].reshape(words.shape[0], -1)
    codes, zeros = unpack(qweight), unpack(checkpoint.part(module, "qzeros"))
    groups = np.arange(codes.shape[0]) // (group_size if group_size > 0 else codes.shape[0])
    return (f32(codes - zeros[groups]) * scales[groups]).T


def unpack_awq_fast(words: np.ndarray) -> np.ndarray:
    """Finds where AutoAWQ's packing puts each element by packing the elements' own numbers, 4 bits at a time."""
    rows, cols = words.shape[0] * 4, words.shape[1]
    places = np.arange(rows * cols).reshape(rows, cols // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    places = places.reshape(rows, cols // 32, 4, 4, 2).transpose(0, 1, 2, 4, 3).reshape(rows // 4, 4, cols // 64, 64)
    places = places.transpose(0, 2, 1, 3).reshape(-1)
    codes = np.empty(rows * cols, np.int64)
    codes[places] = stream(words.reshape(-1), 4)
    return codes.reshape(rows, cols)


# --- compressed-tensors ----------------------------------------------------------------------------------------------


def decode_compressed(checkpoint: Checkpoint, module: str) -> np.ndarray:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    groups = list(checkpoint.config["config_groups"].values())
    group = next(group for group in groups if any(target == "Linear" or target.strip("re:.*") in module for target in group["targets"]))
    form = group.get("format") or checkpoint.config["format"]
    state = checkpoint.below(module)
    weights = group["weights"]
    if form == "pack-quantized":
        zero_point = state.get("weight_zero_point")
        dense = -(-int(state["weight_shape"][1]) * weights["num_bits"] // 32)
        is_old = zero_point is not None and zero_point.dtype == torch.int8
        if is_old or "weight_g_idx" in state or state["weight_packed"].shape[1] != dense:
            return old_pack_quantized(checkpoint, module, weights)
        state["weight_shape"] = state["weight_shape"].tolist()
    if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"):
        return compressed_floats(checkpoint, module, form, state)
    # Otherwise the package rounds what it computes to the dtype of the scales.
    state = {name: tensor for name, tensor in state.items() if name != "bias"} | {"weight_scale": state["weight_scale"].float()}
    arguments = QuantizationArgs(**{key: value for key, value in weights.items() if value is not None})
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    return BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"].float().numpy()


def compressed_floats(checkpoint: Checkpoint, module: str, form: str, state: dict) -> np.ndarray:
    """Unpacks by the package, scales here: the package scales in BF16."""
    from compressed_tensors.compressors.mxfp6.base import unpack_fp6_from_uint8
    from compressed_tensors.compressors.nvfp4.base import unpack_fp4_from_uint8

    if form == "mxfp8-quantized":
        values = state["weight"]
    else:
        packed = state["weight_packed"]
        rows, width = packed.shape
        values = unpack_fp6_from_uint8(packed, rows, width * 4 // 3) if "6" in form else unpack_fp4_from_uint8(packed, rows, width * 2)
    scale = power_or_float(checkpoint, f"{module}.weight_scale")
    if form == "nvfp4-pack-quantized":
        scale = scale / f32(checkpoint.part(module, "weight_global_scale"))
    return values.float().numpy() * spread(scale, values.shape[1] // scale.shape[1])


def old_pack_quantized(checkpoint: Checkpoint, module: str, weights: dict) -> np.ndarray:
    bits, (rows, cols) = weights["num_bits"], checkpoint.part(module, "weight_shape")
    packed, scale = checkpoint.part(module, "weight_packed"), f32(checkpoint.part(module, "weight_scale"))
    half, zeros = 1 << (bits - 1), checkpoint.part(module, "weight_zero_point")
    is_padded = packed.shape[1] == -(-cols // (32 // bits))
    unpack = padded if is_padded else stream
    codes = unpack(packed, bits)[:, :cols] - half
    if zeros is None:
        zeros = np.zeros(scale.shape, np.int64)
    elif zeros.dtype == np.int32:
        zeros = unpack(np.ascontiguousarray(zeros.T), bits)[:, :rows].T - half
    groups = np.arange(cols) // (weights["group_size"] or cols)
    if (g_idx := checkpoint.part(module, "weight_g_idx")) is not None:
        groups = g_idx
    return f32(codes - zeros.astype(np.int64)[:, groups]) * scale[:, groups]


def padded(words: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(32 // bits) * bits
    return (words.view(np.uint32)[..., None].astype(np.int64) >> shifts & ((1 << bits) - 1)).reshape(words.shape[0], -1)


# --- FP8, microscaling, ModelOpt, Quark ------------------------------------------------------------------------------


def cast(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Casts by torch where it has the dtype."""
    if checkpoint.dtypes[name] in TORCH and checkpoint.tensors[name].size:
        return checkpoint.tensor(name).float().numpy()
    return f32(checkpoint.tensors[name])


def decode_fp8(checkpoint: Checkpoint, name: str, scale_name: str) -> np.ndarray:
    weight, scale = cast(checkpoint, name), power_or_float(checkpoint, scale_name)
    config = checkpoint.config
    block = config.get("weight_block_size")
    quark = config.get("global_quant_config", {}).get("weight", {})
    if isinstance(quark, dict) and quark.get("qscheme") == "per_block":
        block = quark["block_size"]
    for group in config.get("config_groups", {}).values():
        structure = group["weights"].get("block_structure")
        block = [int(size) for size in structure.split("x")] if isinstance(structure, str) else structure
    if scale.ndim == 4:
        block, scale = [128, 128], scale[:, 0, :, 0]
    if weight.ndim == 3 or scale.size == 1:
        return weight * (scale if weight.ndim == 3 else scale.reshape(()))
    if block is None or scale.ndim == 1:
        return weight * scale.reshape(weight.shape[0], 1)
    rows, cols = np.arange(weight.shape[0]) // block[0], np.arange(weight.shape[1]) // block[1]
    return weight * scale[rows][:, cols]


def power_or_float(checkpoint: Checkpoint, name: str) -> np.ndarray:
    scale = checkpoint.tensors[name]
    return f32(scale.view(ml_dtypes.float8_e8m0fnu) if scale.dtype == np.uint8 else scale)


def e2m1(data: np.ndarray) -> np.ndarray:
    return f32(stream(data.view(np.uint8), 4).astype(np.uint8).view(ml_dtypes.float4_e2m1fn))


def spread(scale: np.ndarray, size: int) -> np.ndarray:
    return np.repeat(scale, size, axis=-1)


def decode_microscaled(checkpoint: Checkpoint, module: str, kind: str, scale_name: str = "weight_scale") -> np.ndarray:
    weight, name = checkpoint.part(module, "weight"), f"{module}.weight"
    if weight is None:
        weight, name = checkpoint.part(module, "weight_packed"), f"{module}.weight_packed"
    if kind == "mx":
        blocks = weight.reshape(weight.shape[0], -1, 17)
        exponents = blocks[..., :1].view(np.int8).astype(np.float64)
        return (e2m1(np.ascontiguousarray(blocks[..., 1:])) * np.exp2(exponents).astype(np.float32)).reshape(weight.shape[0], -1)
    scale = power_or_float(checkpoint, f"{module}.{scale_name}")
    if kind.startswith("fp6"):
        narrow = ml_dtypes.float6_e2m3fn if kind == "fp6_e2m3" else ml_dtypes.float6_e3m2fn
        values = f32(stream(weight, 6).astype(np.uint8).view(narrow))
    elif kind == "fp4":
        values = e2m1(weight)
    else:
        values = cast(checkpoint, name)
    return values * spread(scale, 32)


def decode_nvfp4(checkpoint: Checkpoint, module: str) -> np.ndarray:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight, scale = checkpoint.tensor(f"{module}.weight"), checkpoint.tensor(f"{module}.weight_scale")
    shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
    if scale.ndim == 1:
        from torchao.prototype.mx_formats.utils import from_blocked

        scale = from_blocked(scale, shape[0], shape[1] // 16).view(torch.float8_e4m3fn)
    packed = NVFP4QTensor(shape, torch.float32, weight)
    double_scale = checkpoint.tensor(f"{module}.weight_scale_2").float()
    return packed.dequantize(torch.float32, scale=scale, double_scale=double_scale, block_sizes={-1: 16}).numpy()


def decode_gpt_oss(checkpoint: Checkpoint, name: str, separator: str) -> np.ndarray:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = checkpoint.tensor(f"{name}{separator}blocks"), checkpoint.tensor(f"{name}{separator}scales")
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).numpy()


def decode_modelopt_int4(checkpoint: Checkpoint, module: str) -> np.ndarray:
    packed, scale = checkpoint.part(module, "weight"), f32(checkpoint.part(module, "weight_scale"))
    signed = lambda nibbles: (nibbles.astype(np.int64) ^ 8) - 8
    weight = np.stack([signed(packed & 15), signed(packed >> 4)], axis=1).reshape(-1, packed.shape[1])
    return f32(weight) * spread(scale, weight.shape[1] // scale.shape[1])


def decode_quark_integers(checkpoint: Checkpoint, module: str) -> np.ndarray:
    weight = checkpoint.config["global_quant_config"]["weight"]
    is_reordered = checkpoint.config["export"]["pack_method"] == "reorder"
    order = [0, 4, 1, 5, 2, 6, 3, 7] if is_reordered else list(range(8))
    scale = f32(checkpoint.part(module, "weight_scale"))

    def unpack(words):
        codes = stream(words, 4).reshape(words.shape[0], -1, 8)[..., order].reshape(words.shape[0], -1)[:, : scale.shape[1]]
        return (codes ^ 8) - 8 if weight["dtype"] == "int4" else codes

    groups = np.arange(checkpoint.part(module, "weight").shape[0]) // 32
    codes, zeros = unpack(checkpoint.part(module, "weight")), unpack(checkpoint.part(module, "weight_zero_point"))
    return (f32(codes - zeros[groups]) * scale[groups]).T


# --- bitsandbytes, HQQ, MLX, torchao, ComfyUI ------------------------------------------------------------------------


def decode_bitsandbytes(checkpoint: Checkpoint, module: str) -> np.ndarray:
    import bitsandbytes.functional as functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    state = checkpoint.below(module)
    weight = state.pop("weight")
    if "SCB" in state:
        return functional.int8_vectorwise_dequant(weight, state["SCB"]).numpy()
    parts = {name: tensor for name, tensor in state.items() if name != "bias"}
    quant_state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    if quant_state.nested:
        quant_state.absmax = quant_state.state2.code[quant_state.absmax.long()]
        size = quant_state.state2.blocksize
        count = quant_state.absmax.numel()
        quant_state.absmax = quant_state.absmax * quant_state.state2.absmax.repeat_interleave(size)[:count] + quant_state.offset
    # Not by its kernel for CPUs, which in this version takes the scales of other blocks where blocks do not end with rows: what
    # it makes of its own packing is twice as far from the original as what its reference makes of it.
    codes = weight.view(torch.uint8).reshape(-1)
    shape = tuple(quant_state.shape)
    return _dequantize_4bit_compute(codes, quant_state.absmax, quant_state.code, quant_state.blocksize, shape, torch.float32).numpy()


def decode_hqq(checkpoint: Checkpoint, module: str) -> np.ndarray:
    from hqq.core.quantize import HQQLinear, Quantizer

    layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
    layer.load_state_dict(checkpoint.below(module))
    meta = dict(layer.meta, compute_dtype=torch.float32, scale=layer.meta["scale"].float(), zero=layer.meta["zero"].float())
    return Quantizer.dequantize(layer.W_q.data, meta).numpy()


def decode_mlx(checkpoint: Checkpoint, module: str) -> np.ndarray:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    config = dict(checkpoint.config)
    config |= config.get(module, {})
    parts = [checkpoint.part(module, part) for part in ("weight", "scales")]
    biases = checkpoint.part(module, "biases")
    biases = checkpoint.part(module, "qbiases") if biases is None else biases
    mode = config.get("mode", "affine")
    widen = lambda values: mx.array(values if values.dtype in (np.uint8, np.uint32) else f32(values))
    arguments = [widen(part) for part in parts] + ([widen(biases)] if biases is not None else [])
    keywords = {"group_size": config["group_size"], "bits": config["bits"], "mode": mode}
    if mode != "affine":
        keywords["dtype"] = mx.float32
    return np.array(mx.dequantize(*arguments, **keywords))


def decode_torchao(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    metadata = {name: text for name, text in checkpoint.metadata.items() if name != "format"}
    # The entries' dtype is what `dequantize` rounds to; F32 keeps what it computes.
    metadata = {name: text.replace('"bfloat16"', '"float32"') for name, text in metadata.items()}
    made, _ = unflatten_tensor_state_dict(tensors, metadata)
    found = {}
    for name, tensor in made.items():
        if type(tensor).__name__ == "Int4Tensor":
            group_size = tensor.block_size[-1]
            data = tensor.qdata.view(torch.uint8)
            codes = torch.stack([data & 15, data >> 4], -1).flatten(1).to(torch.int32)
            groups = torch.arange(codes.shape[1]) // group_size
            scale, zero = tensor.scale.float()[groups].T, tensor.zero_point.float()[groups].T
            found[name] = (((codes ^ 8) - 8).float() * scale + zero).numpy()
        elif type(tensor) is not torch.Tensor:
            if hasattr(tensor, "scale") and tensor.scale.dtype in (torch.bfloat16, torch.float16):
                tensor.scale = tensor.scale.float()
            arguments = [torch.float32] if "output_dtype" in type(tensor).dequantize.__code__.co_varnames else []
            found[name] = tensor.dequantize(*arguments).float().numpy()
    return found


def decode_comfy(checkpoint: Checkpoint, module: str) -> np.ndarray:
    from comfy_kitchen.backends.eager import quantization

    formats = {}
    if "_quantization_metadata" in checkpoint.metadata:
        formats |= json.loads(checkpoint.metadata["_quantization_metadata"])["layers"]
    for name, values in checkpoint.tensors.items():
        if name.endswith(".comfy_quant"):
            formats[name[: -len(".comfy_quant")]] = json.loads(values.tobytes())
    form = formats.get(module, {}).get("format", "float8_e4m3fn")
    weight = checkpoint.tensor(f"{module}.weight")
    scale = f"{module}.weight_scale" if f"{module}.weight_scale" in checkpoint.tensors else f"{module}.scale_weight"
    if scale not in checkpoint.tensors:
        return weight.float().numpy()
    scale = checkpoint.tensor(scale)
    if form == "nvfp4":
        return quantization.dequantize_nvfp4(weight, checkpoint.tensor(f"{module}.weight_scale_2"), scale, torch.float32).numpy()
    if form == "mxfp8":
        return quantization.dequantize_mxfp8(weight, scale, torch.float32).numpy()
    if form == "int8_tensorwise":
        return quantization.dequantize_int8_simple(weight, scale).numpy()
    return quantization.dequantize_per_tensor_fp8(weight, scale, torch.float32).numpy()


# --- Dispatch --------------------------------------------------------------------------------------------------------


def decode(checkpoint: Checkpoint, name: str) -> tuple[str, np.ndarray]:
    """Decodes the tensor of a name; returns also by what."""
    module = name.removesuffix(".weight")
    has = lambda part: f"{module}.{part}" in checkpoint.tensors
    method = checkpoint.config.get("quant_method", "")
    own = checkpoint.dtypes.get(name)
    if f"{name}_blocks" in checkpoint.tensors or f"{name}.blocks" in checkpoint.tensors:
        return "transformers", decode_gpt_oss(checkpoint, name, "_" if f"{name}_blocks" in checkpoint.tensors else ".")
    if has("comfy_quant") or "_quantization_metadata" in checkpoint.metadata or "scaled_fp8" in checkpoint.tensors:
        return "comfy-kitchen", decode_comfy(checkpoint, module)
    if has("qweight"):
        is_awq = method == "awq" or checkpoint.config.get("packing_format", "").endswith("awq") or "w_bit" in checkpoint.config
        return "numpy", decode_awq(checkpoint, module) if is_awq else decode_gptq(checkpoint, module)
    if method == "compressed-tensors":
        return "compressed-tensors", decode_compressed(checkpoint, module)
    if has("SCB") or has("weight.absmax"):
        return "bitsandbytes", decode_bitsandbytes(checkpoint, module)
    if has("W_q"):
        return "hqq", decode_hqq(checkpoint, module)
    if has("scales"):
        return "mlx", decode_mlx(checkpoint, module)
    if method == "quark":
        weight = checkpoint.config["global_quant_config"]["weight"]
        kind = weight["dtype"] if isinstance(weight, dict) else "nvfp4"
        if kind in ("int4", "uint4"):
            return "numpy", decode_quark_integers(checkpoint, module)
        if kind == "nvfp4":
            return "modelopt", decode_nvfp4(checkpoint, module)
        if kind != "fp8_e4m3" or weight["qscheme"] == "per_group":
            return "numpy", decode_microscaled(checkpoint, module, kind)
    if has("weight_scale_2"):
        return "modelopt", decode_nvfp4(checkpoint, module)
    if own == "I8" and has("scale"):
        return "numpy", decode_microscaled(checkpoint, module, "fp4", "scale")
    if own == "I8":
        scale = f32(checkpoint.part(module, "weight_scale"))
        return "numpy", f32(checkpoint.tensors[name]) * scale.reshape(-1, 1)
    if own == "U8":
        scale = checkpoint.part(module, "weight_scale")
        is_int4 = scale.dtype == np.float32
        return "numpy", decode_modelopt_int4(checkpoint, module) if is_int4 else decode_microscaled(checkpoint, module, "fp4")
    if checkpoint.config.get("quant_algo") == "MXFP8":
        return "numpy", decode_microscaled(checkpoint, module, "fp8")
    for scale in ("weight_scale", "weight_scale_inv", "scale", "qscale_weight"):
        if has(scale):
            return "torch", decode_fp8(checkpoint, name, f"{module}.{scale}")
    if f"{name}_scale" in checkpoint.tensors:
        return "torch", decode_fp8(checkpoint, name, f"{name}_scale")
    return "torch", cast(checkpoint, name)


# What takes the power of two that stands for NaN by the format's standard for 2^128.
WITHOUT_NAN = ("transformers", "compressed-tensors", "mlx", "comfy-kitchen")


def agree(found: np.ndarray, due: np.ndarray, by: str) -> np.ndarray:
    same = (found == due) | (np.isnan(found) & np.isnan(due))
    if by in WITHOUT_NAN:
        same |= np.isnan(due)
    if by == "comfy-kitchen":  # It takes 2^-127 for 0.
        same |= (np.abs(due) <= 448 * np.float32(2.0**-127)) & (found == 0)
    return same


def main(folder: Path) -> None:
    decoded_by, wrong = Counter(), 0
    for case in sorted(folder.iterdir()):
        checkpoint, expected = Checkpoint(case), Checkpoint(case / "expected")
        about = json.loads((case / "expected/about.json").read_text())
        torchao = decode_torchao(checkpoint) if "tensor_names" in checkpoint.metadata else {}
        for name, due in expected.tensors.items():
            try:
                by, found = ("torchao", torchao[name]) if name in torchao else decode(checkpoint, name)
            except Exception as error:
                wrong += 1
                print(f"{case.name}: {name}: {type(error).__name__}: {str(error)[:200]}")
                continue
            module = name.removesuffix(".weight")
            if about["is_folded"]:
                found = found * f32(checkpoint.part(module, "pre_quant_scale"))
            decoded_by[by] += 1
            same = found.shape == due.shape and agree(found, due, by)
            if not np.all(same):
                wrong += 1
                places = "" if found.shape != due.shape else f"{(~same).sum()} of {due.size} differ, first {found[~same][0]!r}, not {due[~same][0]!r}"
                print(f"{case.name}: {name} by {by}: {found.shape}, not {due.shape}; {places}")
    print(f"{sum(decoded_by.values())} tensors of {len(list(folder.iterdir()))} checkpoints: {dict(decoded_by)}")
    if wrong:
        sys.exit(f"{wrong} differ")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
