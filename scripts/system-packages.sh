#!/usr/bin/env bash
# Makes sure that Python 3.10, a C++ compiler, nasm and Rust are there: by apt where that is possible, else one line that says what to do.
set -euo pipefail

"${PYTHON:-python3}" -c 'import sys; sys.exit(f"Python >= 3.10 is needed, this is {sys.version.split()[0]}: make PYTHON=<path>" if sys.version_info < (3, 10) else 0)'

missing=()
command -v nasm >/dev/null || missing+=(nasm)
command -v c++ >/dev/null && command -v cc >/dev/null || missing+=(g++)
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)

if ((${#missing[@]})); then
    if [[ $(id -u) == 0 ]]; then
        sudo=()
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo=(sudo -n)
    else
        sudo=(false)
    fi
    if ! { command -v apt-get >/dev/null && "${sudo[@]}" apt-get -qq update &&
        DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get -qq install -y "${missing[@]}" >/dev/null; }; then
        echo "make: please install ${missing[*]} with your package manager (Debian/Ubuntu: sudo apt-get install ${missing[*]}) and run make again" >&2
        exit 1
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "make: Rust is missing; install it with: curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh" >&2
    exit 1
fi
