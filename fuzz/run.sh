#!/bin/sh
# Runs each fuzz target for a while, starting from the committed corpus. Usage: fuzz/run.sh [SECONDS [TARGET...]]
set -eu
cd "$(dirname "$0")"

seconds=${1:-60}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- header index extents quant

missing() {
    echo "fuzz/run.sh: needs $1; $2" >&2
    exit 2
}
command -v cargo >/dev/null || missing "cargo" "install Rust from https://rustup.rs"
cargo +nightly --version >/dev/null 2>&1 ||
    missing "a nightly Rust toolchain" "run: rustup toolchain install nightly --profile minimal"
cargo fuzz --version >/dev/null 2>&1 || missing "cargo-fuzz" "run: cargo install cargo-fuzz --locked"
command -v "${CXX:-c++}" >/dev/null ||
    missing "a C++ compiler, which builds libFuzzer" "install g++ or clang, or set CXX"

for target in "$@"; do
    # What a run finds lands beside the build; the committed corpus is only read.
    found="${CARGO_TARGET_DIR:-target}/corpus/$target"
    mkdir -p "$found"
    dict=
    [ ! -f "$target.dict" ] || dict="-dict=$target.dict"
    echo "fuzz: $target for $seconds s"
    cargo +nightly fuzz run --fuzz-dir . "$target" "$found" "corpus/$target" -- \
        -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=2048 -verbosity=0 -print_final_stats=1 $dict
done
