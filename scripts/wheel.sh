#!/usr/bin/env bash
# Builds the wheel into the given folder, with its tools in .venv-wheel: any torch, any Python, any Linux since glibc 2.17.
set -euo pipefail
cd "$(dirname "$0")/.."

out=$1 policy=manylinux_2_17
venv=$PWD/.venv-wheel
scripts/system-packages.sh
[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH PYO3_PYTHON=$venv/bin/python
python -m pip install --quiet --disable-pip-version-check -r requirements/wheel.txt
rm -f "$out"/cnnrs-*.whl
# Messages of panics name source files: without the folders of this machine.
export RUSTFLAGS="--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=cargo --remap-path-prefix=$PWD=cnnrs"
maturin build --strip --release --locked --zig --compatibility "$policy" --out "$out"

# What the contents fulfil, not what the name claims; the text is wrapped anywhere.
found=$(auditwheel show "$out"/cnnrs-*.whl | tr -s '[:space:]' ' ')
if [[ $found != *"is consistent with the following platform tag: \"${policy}_"* ]]; then
    echo "make: the wheel does not hold $policy: $found" >&2
    exit 1
fi
