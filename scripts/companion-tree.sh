#!/usr/bin/env bash
# Prints the folder to build the companion for the given torch in: libtorch/, or a copy of it with that torch's lock file.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=$1
if grep -q "\"torch==$torch\"" libtorch/pyproject.toml; then
    echo "$PWD/libtorch"
    exit
fi
lock=libtorch/locks/torch-$torch.lock
if [[ ! -e $lock ]]; then
    echo "make: no companion for torch $torch; choose LIBTORCH= one of:" \
        "$(cat libtorch/pyproject.toml <(ls libtorch/locks) | grep -oE 'torch(==|-)[0-9.]*[0-9]' | grep -oE '[0-9.]+' | sort -u | xargs)" >&2
    exit 1
fi
tree=$PWD/build/libtorch-$torch
mkdir -p "$tree"
for file in Cargo.toml build.rs benches src; do ln -sfn "$PWD/$file" "$tree/$file"; done
rm -rf "$tree/libtorch"
cp -a libtorch "$tree/libtorch"
cp "$lock" "$tree/libtorch/Cargo.lock"
sed -i -E "s/\"torch==[0-9.]+\"/\"torch==$torch\"/g" "$tree/libtorch/pyproject.toml"
echo "$tree/libtorch"
