"""Compares what `tensorhaul convert --dequantize f32` makes of files that quantizers wrote with what the quantizers make of them.

Usage: quantized.py TENSORHAUL [FOLDER]

TENSORHAUL is the command, FOLDER where to keep the checkpoints, each with what is expected of it in `expected`. Written and read
back, on a CPU, by compressed-tensors 0.20.0, bitsandbytes 0.50.2, hqq 0.2.8.post1, mlx 0.32.4 and torchao 0.18.0, with torch 2.11.0
and safetensors 0.8.0; weights are of a seeded generator. The results are compared bit by bit, but for the sign of zero.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

warnings.filterwarnings("ignore")
torch.manual_seed(0)
NAME = "model.layers.0.mlp.down_proj"
SIZES = [(48, 128), (40, 384)]
DENSE = {"model.norm.weight": torch.randn(24), "lm_head.weight": torch.randn(37, 24).to(torch.bfloat16)}


def weight(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols) * 0.05


def named(state: dict, module: str = NAME) -> dict:
    return {f"{module}.{part}": tensor.contiguous() for part, tensor in state.items()}


# --- One generator a package: name, tensors, quantization_config, header's metadata, expected values. -------------------


def compressed_tensors():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    integers = [
        ("pack-quantized", {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": size})
        for bits in range(2, 9)
        for symmetric in (True, False)
        for strategy, size in (("group", 32), ("group", 128), ("channel", None))
    ]
    others = [("int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"})]
    others += [("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": name}) for name in ("tensor", "channel")]
    for form, arguments in integers + others:
        for rows, cols in SIZES:
            original, group = weight(rows, cols), arguments.get("group_size") or cols
            args = QuantizationArgs(**{key: value for key, value in arguments.items() if value is not None})
            grouped = original.reshape(rows, -1, group) if arguments["strategy"] != "tensor" else original.reshape(1, 1, -1)
            scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            if arguments["strategy"] == "tensor":
                scale, zero_point = scale.reshape(1), zero_point.reshape(1)
            state = {"weight": original, "weight_scale": scale.to(torch.bfloat16).float(), "weight_zero_point": zero_point}
            scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
            compressor = BaseCompressor.get_value_from_registry(form)
            packed = compressor.compress(state, scheme)
            packed = {part: tensor for part, tensor in packed.items() if isinstance(tensor, torch.Tensor)}
            expected = compressor.decompress(dict(packed), scheme)["weight"].float()
            packed["weight_scale"] = packed["weight_scale"].to(torch.bfloat16)
            config = {
                "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ["lm_head"],
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json()), "format": form}},
            }
            yield f"compressed-tensors {form} {arguments} {rows}x{cols}", named(packed), config, {}, {f"{NAME}.weight": expected}


def bitsandbytes():
    import bitsandbytes.functional as functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for storage in (torch.uint8, torch.bfloat16):
                for rows, cols in SIZES + [(42, 90)]:
                    packed, state = functional.quantize_4bit(
                        weight(rows, cols), blocksize=64, quant_type=kind, compress_statistics=nested, quant_storage=storage
                    )
                    tensors = {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()} | {"weight": packed}
                    scales = state.absmax
                    if nested:
                        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
                    codes = packed.reshape(-1).view(torch.uint8)
                    expected = _dequantize_4bit_compute(codes, scales, state.code, 64, (rows, cols), torch.float32)
                    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
                    name = f"bitsandbytes {kind} nested {nested} {storage} {rows}x{cols}"
                    yield name, named(tensors), config, {}, {f"{NAME}.weight": expected}
    for rows, cols in SIZES:
        packed, scale, _ = functional.int8_vectorwise_quant(weight(rows, cols).half())
        tensors = {"weight": packed, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        expected = functional.int8_vectorwise_dequant(packed, scale)
        yield f"bitsandbytes int8 {rows}x{cols}", named(tensors), config, {}, {f"{NAME}.weight": expected}


def hqq():
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits in (8, 5, 4, 3, 2, 1):
        for axis in (0, 1):
            for rows, cols in SIZES:
                linear = torch.nn.Linear(cols, rows)
                config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
                layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
                expected = layer.dequantize().float()
                config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": bits, "group_size": 64, "axis": axis}}}
                yield f"hqq {bits} bits axis {axis} {rows}x{cols}", named(layer.state_dict()), config, {}, {f"{NAME}.weight": expected}


def mlx():
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    modes = [("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)]
    for mode, bits, size in modes + [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]:
        for rows, cols in SIZES:
            keywords = {"group_size": size, "bits": bits, "mode": mode}
            parts = mx.quantize(mx.array(weight(rows, cols).numpy()), **keywords)
            dtype = {} if mode == "affine" else {"dtype": mx.float32}
            expected = torch.from_numpy(np.array(mx.dequantize(*parts, **keywords, **dtype)))
            tensors = dict(zip(("weight", "scales", "biases"), (torch.from_numpy(np.array(part)) for part in parts)))
            yield f"mlx {mode} {bits} bits {size} {rows}x{cols}", named(tensors), None, {"mlx": keywords}, {f"{NAME}.weight": expected}


def torchao():
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    def quantized(config, rows, cols):
        linear = torch.nn.Sequential(torch.nn.Linear(cols, rows, bias=False))
        quantize_(linear, config)
        return linear[0].weight.data

    for rows, cols in SIZES:
        made = {
            "float8": quantized(Float8WeightOnlyConfig(), rows, cols),
            "int8": quantized(Int8WeightOnlyConfig(version=2), rows, cols),
            "int4 in bytes": quantized(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), rows, cols),
            "int3 in bytes": quantized(IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0)), rows, cols),
        }
        for swizzled in (False, True):
            for element in (torch.float8_e4m3fn, torch.float4_e2m1fn_x2):
                name = f"mx {element} swizzled {swizzled}"
                made[name] = MXTensor.to_mx(weight(rows, cols), element, 32, is_swizzled_scales=swizzled)
            scale = torch.tensor(0.0001)
            made[f"nvfp4 swizzled {swizzled}"] = NVFP4Tensor.to_nvfp4(weight(rows, cols), 16, per_tensor_scale=scale, is_swizzled_scales=swizzled)
        for name, tensor in made.items():
            tensors, metadata = flatten_tensor_state_dict({f"{NAME}.weight": tensor})
            expected = tensor.dequantize().float()
            config = {"quant_method": "torchao", "quant_type": {}}
            yield f"torchao {name} {rows}x{cols}", tensors, config, metadata, {f"{NAME}.weight": expected}


# --- Writing, converting, comparing -------------------------------------------------------------------------------------


def write(folder: Path, tensors: dict, config: dict | None, metadata: dict, expected: dict) -> None:
    (folder / "expected").mkdir(parents=True)
    config = {"quantization_config": config} if config is not None else {"quantization": metadata["mlx"]}
    metadata = {key: value for key, value in metadata.items() if isinstance(value, str)} | {"format": "pt"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | DENSE, folder / "model.safetensors", metadata)
    save_file({name: tensor.float().contiguous() for name, tensor in expected.items()}, folder / "expected/model.safetensors")
    dense = [name for name in tensors if name == f"{NAME}.bias"] + list(DENSE)
    (folder / "expected/about.json").write_text(json.dumps({"dense": dense, "optional": [], "is_folded": False}))


def load_file(path: Path) -> dict:
    return {name: tensor.float().numpy() for name, tensor in load_tensors(path).items()}  # numpy has no BF16.


def difference(command: str, folder: Path, converted: Path) -> str | None:
    """Converts a checkpoint, and says in what the result differs, if it does."""
    arguments = [command, "convert", str(folder), str(converted), "--dequantize", "f32"]
    run = subprocess.run(arguments, capture_output=True, text=True)
    if run.returncode:
        return run.stderr.strip() or run.stdout.strip()
    files = [converted] if converted.is_file() else sorted(converted.glob("*.safetensors"))
    found = {name: values for file in files for name, values in load_file(file).items()}
    for name, due in load_file(folder / "expected/model.safetensors").items():
        if name not in found:
            return f"{name} is missing; there are {sorted(found)}"
        if found[name].shape != due.shape:
            return f"{name}: {found[name].shape}, not {due.shape}"
        wrong = (found[name] != due) & ~(np.isnan(found[name]) & np.isnan(due))
        if wrong.any():
            return f"{name}: {wrong.sum()} of {due.size} differ, first {found[name][wrong][0]!r}, not {due[wrong][0]!r}"
    return None


def main(command: str, kept: Path | None) -> None:
    count, wrong = 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        for package in (compressed_tensors, bitsandbytes, hqq, mlx, torchao):
            for name, *checkpoint in package():
                folder = (kept or Path(temporary)) / name.replace("/", "_")
                write(folder, *checkpoint)
                count += 1
                if problem := difference(command, folder, Path(temporary) / f"converted-{count}"):
                    wrong += 1
                    print(f"{name}: {problem}")
    print(f"{count} checkpoints, {wrong} differ")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) == 3 else None)
