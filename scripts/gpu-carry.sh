#!/usr/bin/env bash
# Makes the folder that scripts/gpu-check.sh runs in on a machine with a GPU: the wheel and pytest, both unpacked, tests,
# benchmarks and photos. That machine needs Python, torch, torchvision and what they bring; no Rust, no network, no pip.
set -euo pipefail
cd "$(dirname "$0")/.."

carry=$1 python=${PYTHON:-python3} python_version=3.12 most_mib=60 photos_mib=40
photos=${CNNRS_PHOTOS:-../shared/data/cats_dogs}

fail() {
    echo "gpu-carry: $*" >&2
    exit 1
}

wheels=(dist/cnnrs-*.whl)
[[ ${#wheels[@]} == 1 && -f ${wheels[0]} ]] || fail "dist/ has no wheel, or several: make wheel"
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip: make gpu-carry PYTHON=<path>"

rm -rf "$carry"
mkdir -p "$carry"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --only-binary=:all: \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --python-version "$python_version" \
    --target "$carry/site" -r requirements/gpu-check.txt "${wheels[0]}" >"$log" 2>&1 ||
    fail "pip could not get requirements/gpu-check.txt and the wheel: $(grep -m1 ERROR "$log" || tail -n1 "$log")"
compiled=$(find "$carry/site" -name '*.cpython-*')
[[ -z $compiled ]] || fail "compiled for one version of Python only: $compiled"

cp pyproject.toml "$carry"
mkdir -p "$carry/scripts" "$carry/tests"
cp scripts/gpu-check.sh "$carry/scripts"
cp -r benches "$carry/benches"
cp -r tests/python "$carry/tests/python"
find "$carry/benches" "$carry/tests" -name __pycache__ -prune -exec rm -rf {} +
git describe --always --dirty >"$carry/commit" || fail "git does not know the commit"

if [[ -d $photos ]]; then
    # Every n-th of the sorted names, so that all classes shrink alike.
    nth=$(($(du -smL "$photos" | cut -f1) / photos_mib + 1))
    mkdir "$carry/photos"
    (cd "$photos" && find -L . -type f -iname '*.jp*g' | sort | awk "NR % $nth == 0" | tar -ch -T -) |
        tar -xC "$carry/photos"
else
    echo "gpu-carry: no photos in $photos (CNNRS_PHOTOS): the check will make pictures of its own"
fi

mib=$(du -sm --apparent-size "$carry" | cut -f1)
((mib < most_mib)) || fail "$carry has $mib MiB, $most_mib are too many to carry"
echo "gpu-carry: $carry, $mib MiB, $(find "$carry/photos" -type f 2>/dev/null | wc -l) photos, commit $(<"$carry/commit")"
