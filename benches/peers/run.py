#!/usr/bin/env python3
"""Times safetensors loaders on one folder, cold and warm, and tensorhaul beside them.

    run.py MODEL_DIR [--ours NAME=COMMAND]... [--only TEXT]... [--rounds 7] [--out FILE]

A peer whose package is missing is left out and named. README.md says how to install them, and how the runs are made
comparable. COMMAND is run with {dir} replaced and must print one JSON object with `seconds` and `bytes`, as
`tensorhaul load {dir} --json` does; `seconds` counts until every byte is in memory.
"""
import argparse
import ctypes
import importlib
import json
import mmap
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

PAGE_BYTES = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


# ------------------------------------------------------------------------------------------------------------ peers
# A peer loads all files and returns the tensors; whatever must outlive them is an attribute of the dict it returns.
class Tensors(dict):
    keep = None


def torch_load_file(paths):
    from safetensors.torch import load_file

    tensors = Tensors()
    for path in paths:
        tensors.update(load_file(path))
    return tensors


def run_ai(paths):
    from runai_model_streamer import SafetensorsStreamer

    tensors = Tensors()
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in paths])
        tensors.update(streamer.get_tensors())
    return tensors


def fastsafetensors(paths):
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: [str(path) for path in paths]})
    files = loader.copy_files_to_device()
    tensors = Tensors({name: files.get_tensor(name) for name in loader.get_keys()})
    tensors.keep = (loader, files)
    return tensors


# Name: the load, the modules to import before the clock starts, and the environment.
PEERS = {
    "safetensors.torch.load_file": (torch_load_file, ["safetensors.torch"], {}),
    "Run:ai streamer": (run_ai, ["torch", "runai_model_streamer"], {}),
    "Run:ai streamer, sync_buffered": (
        run_ai,
        ["torch", "runai_model_streamer"],
        {"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"},
    ),
    "fastsafetensors": (fastsafetensors, ["torch", "fastsafetensors"], {}),
    "fastsafetensors, buffered": (fastsafetensors, ["torch", "fastsafetensors"], {"FASTSAFETENSORS_ODIRECT": "0"}),
}


# -------------------------------------------------------------------------------------------------- the machine's state
class CachestatRange(ctypes.Structure):
    _fields_ = [("off", ctypes.c_uint64), ("len", ctypes.c_uint64)]


def cached_bytes(path):
    """Counts the bytes of a file in the page cache: cachestat(2), Linux 6.5."""
    counts = (ctypes.c_uint64 * 5)()
    whole = CachestatRange(0, 0)
    with open(path, "rb") as file:
        if LIBC.syscall(451, file.fileno(), ctypes.byref(whole), counts, 0) != 0:
            raise OSError(ctypes.get_errno(), "cachestat")
    return counts[0] * PAGE_BYTES


def evict(paths):
    for _ in range(50):
        for path in paths:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not any(map(cached_bytes, paths)):
            return
        time.sleep(0.02)
    raise OSError("the page cache keeps pages of the model")


def warm(paths):
    """Reads what the page cache lacks. Some systems give idle pages back at once, so it is tried a few times."""
    for _ in range(8):
        cold = [path for path in paths if cached_bytes(path) < path.stat().st_size]
        if not cold:
            return
        for path in cold:
            with open(path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                buffer = bytearray(4 << 20)
                while file.readinto(buffer):
                    pass
    raise OSError(f"the page cache does not keep {cold[0]}")


def prime(len_bytes):
    """Touches and frees memory: see `prime` in ../src/memory.rs."""
    len_bytes = len_bytes // PAGE_BYTES * PAGE_BYTES
    memory = mmap.mmap(-1, len_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(start, 1, len_bytes)
    balloon = Path("/sys/bus/virtio/drivers/virtio_balloon")
    if balloon.exists() and any(entry.name.startswith("virtio") for entry in balloon.iterdir()):
        time.sleep(2.3)
    LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    LIBC.madvise(start, len_bytes, mmap.MADV_DONTNEED)


def busy_seconds():
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(ticks[:3]) + sum(ticks[5:7])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------------------------- one run
def touch(tensors):
    """Reads one byte of every page, so that a mapping pays for its reads too."""
    import torch

    for tensor in tensors.values():
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        if flat.size:
            int(flat[::PAGE_BYTES].sum()) + int(flat[-1])


def checksums(tensors):
    import torch
    from xxhash import xxh3_64_hexdigest

    flat = lambda tensor: tensor.contiguous().reshape(-1).view(torch.uint8).numpy()  # noqa: E731
    return {name: xxh3_64_hexdigest(memoryview(flat(tensor))) for name, tensor in tensors.items()}


def run_peer_here(name, paths, primed_bytes, with_checksums):
    """Runs in a process of its own."""
    load, modules, _ = PEERS[name]
    for module in [*modules, "numpy"]:
        importlib.import_module(module)
    if primed_bytes:
        prime(primed_bytes)
    cpu, start = time.process_time(), time.perf_counter()
    tensors = load(paths)
    touch(tensors)
    result = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if with_checksums:
        result["checksums"] = checksums(tensors)
    print(json.dumps(result), flush=True)
    os._exit(0)  # Taking things down is no part of the run.


def run(name, command, paths, primed_bytes, with_checksums=False):
    environment = dict(os.environ)
    if command is None:
        environment |= PEERS[name][2]
        call = [sys.executable, __file__, str(paths[0].parent), "--one", name, "--prime", str(primed_bytes)]
        call += ["--checksums"] * with_checksums
    else:
        call = shlex.split(command.format(dir=paths[0].parent)) + ["--checksum"] * with_checksums
        if primed_bytes:
            prime(primed_bytes)
    before, start = busy_seconds(), time.perf_counter()
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    stdout, stderr = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{name}: {stderr.strip().splitlines()[-1:] or status}")
    elapsed, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    result = json.loads(stdout.strip().splitlines()[-1]) if command is None else json.loads(stdout)
    result.setdefault("cpu_seconds", cpu)
    result.setdefault("peak_bytes", usage.ru_maxrss * 1024)
    return result | {"others_cores": max(0.0, (busy_seconds() - before - cpu) / elapsed)}


# -------------------------------------------------------------------------------------------------------------- all runs
def wait_until_quiet(cores):
    for _ in range(200):
        before = busy_seconds()
        time.sleep(0.3)
        if (busy_seconds() - before) / 0.3 <= cores:
            return


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--ours", action="append", default=[], metavar="NAME=COMMAND")
    arguments.add_argument("--only", action="append", metavar="TEXT", help="peers whose name holds this")
    arguments.add_argument("--modes", default="cold,warm")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--quiet", type=float, metavar="CORES", help="repeat runs while others kept more busy")
    arguments.add_argument("--out", type=Path, help="write every run as JSON")
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    arguments.add_argument("--prime", type=int, default=0, help=argparse.SUPPRESS)
    arguments.add_argument("--checksums", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    paths = sorted(given.model.resolve().glob("*.safetensors"))
    if given.one:
        run_peer_here(given.one, paths, given.prime, given.checksums)

    total_bytes = sum(path.stat().st_size for path in paths)
    entries = {name: None for name in PEERS if not given.only or any(text in name for text in given.only)}
    entries |= dict(ours.split("=", 1) for ours in given.ours)
    entries, versions = checked(entries, paths)

    runs = {(mode, name): [] for mode in given.modes.split(",") for name in entries}
    for round_ in range(given.rounds):
        for mode in given.modes.split(","):
            # Forth and back, so that nobody always follows the same other one.
            for name, command in list(entries.items())[:: 1 if round_ % 2 == 0 else -1]:
                for _attempt in range(5):
                    if given.quiet is not None:
                        wait_until_quiet(given.quiet)
                    (evict if mode == "cold" else warm)(paths)
                    result = run(name, command, paths, total_bytes + (512 << 20))
                    if given.quiet is None or result["others_cores"] <= given.quiet:
                        break
                result.pop("checksums", None)
                runs[mode, name].append(result)
        print(f"round {round_ + 1} of {given.rounds}", file=sys.stderr)

    print_table(runs, total_bytes, versions)
    if given.out:
        rows = [{"mode": mode, "name": name, "runs": results} for (mode, name), results in runs.items()]
        given.out.write_text(json.dumps({"bytes": total_bytes, "versions": versions, "rows": rows}, indent=1) + "\n")


def checked(entries, paths):
    """Leaves out who is not there or returns other bytes than the first that is."""
    kept, versions, expected = {}, {}, None
    for name, command in entries.items():
        try:
            found = run(name, command, paths, 0, with_checksums=True)["checksums"]
        except (RuntimeError, OSError, ValueError) as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        expected = expected or found
        if found != expected:
            print(f"left out: {name}: returns other bytes than {next(iter(kept))}", file=sys.stderr)
            continue
        kept[name] = command
    for package in ["safetensors", "torch", "runai-model-streamer", "fastsafetensors"]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return kept, versions


def print_table(runs, total_bytes, versions):
    print("| | | seconds | spread | GB/s | CPU s/GB | peak MiB |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for (mode, name), results in runs.items():
        median = lambda key: statistics.median(result[key] for result in results)  # noqa: E731,B023
        seconds = [result["seconds"] for result in results]
        print(
            f"| {mode} | {name} | {median('seconds'):.3f} | {min(seconds):.3f} - {max(seconds):.3f} "
            f"| {total_bytes / median('seconds') / 1e9:.2f} | {median('cpu_seconds') * 1e9 / total_bytes:.3f} "
            f"| {median('peak_bytes') / 2**20:.0f} |"
        )
    print(", ".join(f"{package} {version}" for package, version in versions.items()))


if __name__ == "__main__":
    import importlib.metadata

    main()
