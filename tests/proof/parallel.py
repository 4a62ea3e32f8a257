"""Compares every rank's checkpoint that `tensorhaul convert` writes with what transformers' plan for the model's class makes of it.

Usage: parallel.py TENSORHAUL FOLDER

TENSORHAUL is the command, FOLDER a checkpoint of an architecture that transformers knows. `cargo xtask proof` runs this on the one in the
repository, with transformers 5.23.0: the plan is its `base_model_tp_plan` and `_tp_plan`, what the words mean is written down here once
more, with numpy, and compared byte for byte, twice: with the plan given as rules, and with the command's own table for the architecture.
The table differs where it is stricter, since it cuts between heads alone, and in the embeddings, of which each rank has a share.
"""

import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors
import transformers
from transformers import AutoConfig

#: Element types by their names in the file. Those that numpy lacks are compared as their bytes.
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}

Tensors = dict[str, tuple[str, np.ndarray]]


def main(command: str, folder: Path) -> None:
    whole = read(folder)
    plan = own_plan(folder)
    heads = AutoConfig.from_pretrained(folder).num_attention_heads
    ours = plan | {"model.embed_tokens": "embedding_rowwise"}
    differences = 0
    with tempfile.TemporaryDirectory() as scratch:
        rules = Path(scratch) / "plan.json"
        rules.write_text(json.dumps(plan))
        for size in (1, 2, 3, 4):
            for rank in range(size):
                place = ["--tp-size", str(size), "--tp-rank", str(rank)]
                given = [*place, "--rules", str(rules)]
                differences += compare(command, folder, scratch, given, cut_all(whole, plan, rank, size))
                table = [*place, "--unmatched", "replicate"]
                if heads % size == 0:
                    differences += compare(command, folder, scratch, table, cut_all(whole, ours, rank, size))
                else:
                    differences += refusal(command, folder, scratch, table, f"{size} ranks cannot share ")
    if differences:
        sys.exit(f"{differences} differences")


def own_plan(folder: Path) -> dict[str, str]:
    """The plan of the base model, whose names begin behind `model.`, and of what the class puts on top of it.

    The second is read out of the source, since importing the class takes torch.
    """
    config = AutoConfig.from_pretrained(folder)
    name = config.architectures[0]
    source = Path(transformers.__file__).parent / "models" / config.model_type / f"modeling_{config.model_type}.py"
    classes = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name]
    assigned = [node for node in classes[0].body if isinstance(node, ast.Assign)]
    top = [ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "_tp_plan"]
    return {f"model.{pattern}": word for pattern, word in config.base_model_tp_plan.items()} | top[0]


def read(folder: Path) -> Tensors:
    """Reads with the package's own reader; elements become one more dimension, of their bytes."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            width = WIDTHS.get(tensor["dtype"], 1)
            elements = np.frombuffer(tensor["data"], np.uint8).reshape(*tensor["shape"], width)
            tensors[name] = (tensor["dtype"], elements)
    return tensors


def cut_all(whole: Tensors, plan: dict[str, str], rank: int, size: int) -> Tensors:
    return {name: (dtype, cut(name, tensor, plan, rank, size)) for name, (dtype, tensor) in whole.items()}


def cut(name: str, tensor: np.ndarray, plan: dict[str, str], rank: int, size: int) -> np.ndarray:
    """What a rank has of a tensor.

    Shares are `torch.chunk`'s: as many each as go around, and the last ranks have fewer. Scales of a whole tensor go with it.
    """
    module, leaf = name.rsplit(".", 1)
    word = plan.get(".".join("*" if part.isdigit() else part for part in module.split(".")))
    ndim = tensor.ndim - 1
    dims = {
        "colwise": max(ndim - 2, 0),
        "colwise_gather_output": max(ndim - 2, 0),
        "rowwise": ndim - 1 if leaf != "bias" else None,
        "embedding_rowwise": 0,
        None: None,
    }
    dim = dims[word]
    if dim is None or ndim == 0:
        return tensor
    each = -(-tensor.shape[dim] // size)
    return np.take(tensor, range(min(rank * each, tensor.shape[dim]), min((rank + 1) * each, tensor.shape[dim])), dim)


def compare(command: str, folder: Path, scratch: str, arguments: list[str], expected: Tensors) -> int:
    with tempfile.TemporaryDirectory(dir=scratch) as parent:
        out = Path(parent) / "rank"
        subprocess.run([command, "convert", str(folder), str(out), *arguments], check=True, stdout=subprocess.DEVNULL)
        found = read(out)
    wrong = sorted(name for name in expected | found if not is_same(expected.get(name), found.get(name)))
    print(f"{' '.join(arguments[:4])}, {'transformers plan' if '--rules' in arguments else 'own table'}: ", end="")
    print(f"{len(expected)} tensors, {len(wrong)} differ")
    for name in wrong[:10]:
        print(f"  {name}: {described(found.get(name))}, expected {described(expected.get(name))}")
    return len(wrong)


def refusal(command: str, folder: Path, scratch: str, arguments: list[str], numbers: str) -> int:
    """A size that does not divide the heads is the command line's fault, told with the numbers in one line."""
    out = Path(scratch) / "refused"
    ran = subprocess.run([command, "convert", str(folder), str(out), *arguments], capture_output=True, text=True)
    is_told = ran.returncode == 2 and ran.stderr.count("\n") == 1 and numbers in ran.stderr
    print(f"{' '.join(arguments[:4])}, own table: exit {ran.returncode}, {ran.stderr.strip()}")
    return 0 if is_told and not out.exists() else 1


def is_same(one: tuple[str, np.ndarray] | None, other: tuple[str, np.ndarray] | None) -> bool:
    return one is not None and other is not None and one[0] == other[0] and np.array_equal(one[1], other[1])


def described(tensor: tuple[str, np.ndarray] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {list(tensor[1].shape[:-1])}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
