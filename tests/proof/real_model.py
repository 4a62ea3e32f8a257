"""Compares every tensor that `tensorhaul load` reads with what the safetensors package reads.

Usage: real_model.py TENSORHAUL PATH...

TENSORHAUL is the command, each PATH a safetensors file or a folder of them. `cargo xtask proof` runs this on a real
model. The comparison is of xxh3-64 checksums: ours as the command reports them, the reference's computed here.
"""

import json
import subprocess
import sys
from pathlib import Path

import safetensors
import xxhash

ENGINES = ("mmap", "pread", "io-uring")


def main(command: str, paths: list[str]) -> None:
    differences = 0
    for path in map(Path, paths):
        expected = reference_checksums(path)
        for engine in ENGINES:
            report = load(command, path, engine)
            wrong = differing(expected, report["checksums"])
            differences += len(wrong)
            print(f"{path.name}, {engine} asked, {report['engine']} ran: {len(expected)} tensors, {len(wrong)} differ")
            for name in wrong[:10]:
                print(f"  {name}: {report['checksums'].get(name)}, expected {expected.get(name)}")
            for fallback in report["fallbacks"]:
                print(f"  {fallback['what']}: {fallback['why']}")
    if differences:
        sys.exit(f"{differences} differences")


def reference_checksums(path: Path) -> dict[str, str]:
    """Reads with `deserialize`, the package's own reader under every framework: it knows dtypes that numpy lacks."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {
        name: xxhash.xxh3_64_hexdigest(tensor["data"])
        for file in files
        for name, tensor in safetensors.deserialize(file.read_bytes())
    }


def load(command: str, path: Path, engine: str) -> dict:
    arguments = [command, "load", str(path), "--engine", engine, "--checksum", "--json"]
    return json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE).stdout)


def differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(name for name in expected | found if expected.get(name) != found.get(name))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
