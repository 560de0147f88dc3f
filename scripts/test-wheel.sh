#!/usr/bin/env bash
# Installs the wheel for one torch into a fresh virtual environment and runs the Python tests against it, not against the tree.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=$1 dist=$2
venv=$PWD/build/wheel-venv-$torch
rm -rf "$venv"
python -m venv "$venv"
export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
python -m pip install --quiet --disable-pip-version-check -r "requirements/torch-$torch.txt" -r requirements/dev.txt
python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$dist"/cnnrs-*.whl
python -m pip check
python -c 'import cnnrs, torch; print("testing", cnnrs.__file__, "with torch", torch.__version__)'
python -m pytest tests/python
