#!/usr/bin/env bash
# Derives locks/torch-<version>.lock from Cargo.lock: the same crates, with tch, pyo3-tch and torch-sys of that torch.
# With --check nothing is written: it fails where a lock differs from Cargo.lock in anything but that trio.
set -euo pipefail
cd "$(dirname "$0")/.."

# torch version -> tch version; torch-sys refuses any other torch.
declare -A tch=([2.11.0]=0.24.0)

# A lock file without the version and checksum of the trio.
others() {
    awk '/^\[\[package\]\]/ { skip = 0 } /^name = "(tch|pyo3-tch|torch-sys)"$/ { skip = 1 } !(skip && /^(version|checksum) =/)' "$1"
}

if [[ ${1:-} == --check ]]; then
    for torch in "${!tch[@]}"; do
        if ! diff <(others Cargo.lock) <(others "locks/torch-$torch.lock"); then
            echo "locks/torch-$torch.lock is behind Cargo.lock: run make locks" >&2
            exit 1
        fi
    done
    exit 0
fi

mkdir -p build
tree=$(mktemp -d build/locks.XXXX)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/src"
touch "$tree/src/lib.rs"
for torch in "${!tch[@]}"; do
    cp Cargo.toml Cargo.lock "$tree"
    for crate in pyo3-tch tch torch-sys; do
        cargo update --quiet --manifest-path "$tree/Cargo.toml" --package "$crate" --precise "${tch[$torch]}"
    done
    cp "$tree/Cargo.lock" "locks/torch-$torch.lock"
    echo "locks/torch-$torch.lock: tch ${tch[$torch]}"
done
