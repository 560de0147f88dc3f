#!/usr/bin/env bash
# Derives libtorch/locks/torch-<version>.lock from libtorch/Cargo.lock: the same crates, with tch, pyo3-tch and torch-sys of
# that torch. With --check nothing is written: it fails where a lock differs in anything but that trio.
set -euo pipefail
cd "$(dirname "$0")/.."

# torch version -> tch version; torch-sys refuses any other torch.
declare -A tch=([2.11.0]=0.24.0)

# A lock file without the version and checksum of the trio.
others() {
    awk '/^\[\[package\]\]/ { skip = 0 } /^name = "(tch|pyo3-tch|torch-sys)"$/ { skip = 1 } !(skip && /^(version|checksum) =/)' "$1"
}

for torch in "${!tch[@]}"; do
    lock=libtorch/locks/torch-$torch.lock
    if [[ ${1:-} == --check ]]; then
        diff <(others libtorch/Cargo.lock) <(others "$lock") || { echo "$lock is behind libtorch/Cargo.lock: run make locks" >&2; exit 1; }
        continue
    fi
    cp libtorch/Cargo.lock "$lock"
    tree=$(scripts/companion-tree.sh "$torch")
    for crate in pyo3-tch tch torch-sys; do
        cargo update --quiet --manifest-path "$tree/Cargo.toml" --package "$crate" --precise "${tch[$torch]}"
    done
    cp "$tree/Cargo.lock" "$lock"
    echo "$lock: tch ${tch[$torch]}"
done
