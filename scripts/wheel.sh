#!/usr/bin/env bash
# Builds the wheel against the torch of the active virtual environment, from a copy of the tree.
# The copy differs from the tree in two places when that torch is not the default one: the lock file and the declared dependency.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=$1 out=$2
tree=build/torch-$torch
rm -rf "$tree"
mkdir -p "$tree" "$out"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    [[ -e $file ]] && printf '%s\0' "$file"
done | tar --null --files-from - --create --file - | tar --extract --file - --directory "$tree"
[[ ! -e locks/torch-$torch.lock ]] || cp "locks/torch-$torch.lock" "$tree/Cargo.lock"
sed -i -E "s/\"torch==[0-9.]+\"/\"torch==$torch\"/g" "$tree/pyproject.toml"

target=$PWD/target
[[ ! -e locks/torch-$torch.lock ]] || target=$PWD/target/torch-$torch
out=$PWD/$out
cd "$tree"
CARGO_TARGET_DIR=$target maturin build --release --locked --out "$out"
