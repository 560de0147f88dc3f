#!/usr/bin/env bash
# Runs targets one after the other: fuzz/run.sh 600 [target...]; needs `cargo install cargo-fuzz`.
# libFuzzer needs unstable compiler flags; RUSTC_BOOTSTRAP lets the stable compiler take them.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-600}
shift || true
export RUSTC_BOOTSTRAP=1
for target in ${*:-$(cargo fuzz list)}; do
    mkdir -p "fuzz/found/$target"
    # New inputs go to found/, the committed seeds stay as they are.
    cargo fuzz run "$target" "fuzz/found/$target" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -max_len=16384 -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=256 -print_final_stats=1 \
        || echo "$target: see fuzz/artifacts/$target"
done
