#!/usr/bin/env bash
# Build .venv from the pinned requirements (`make setup`). Environment: PYTHON, TORCH_INDEX (both optional).
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=deploy/requirements

fail() {
    printf 'make setup: %s\n' "$@" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
}

python=$(find_python)
missing=()
[[ -n $python ]] || missing+=("Python 3.11 or 3.12 is missing (looked for: ${PYTHON:-python3, python3.11, python3.12}); make setup PYTHON=/path/to/python3.11")
if [[ -n $python ]]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        missing+=("$python cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv)")
    "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())' ||
        missing+=("$python has no C headers, DeepSpeed compiles against them (Debian, Ubuntu: python3-dev)")
fi
command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null ||
    missing+=("a C++ compiler is missing, DeepSpeed compiles a part at its first start (Debian, Ubuntu: g++)")
((${#missing[@]} == 0)) || fail "${missing[@]}"

index=()
[[ -z ${TORCH_INDEX:-} ]] || index=(--extra-index-url "$TORCH_INDEX")

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
pip install --quiet "${index[@]}" -r "$requirements/cpu.txt"
pip install --quiet --no-deps -r "$requirements/cpu-nodeps.txt"
pip install --quiet --no-deps -e .
