#!/usr/bin/env bash
# Checks the machine's Python and compiler before `make setup` downloads anything. Usage: preflight.sh PYTHON
set -euo pipefail

python=${1:-}
missing=()

if [[ -z $python ]] || ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
    missing+=("Python 3.11 or 3.12 (found: $("${python:-false}" --version 2>/dev/null || echo none); make setup PYTHON=/path/to/python3.11)")
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    missing+=("the venv module of $python (on Debian and Ubuntu: the package python3-venv)")
elif ! "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'; then
    missing+=("the headers of $python, Python.h (on Debian and Ubuntu: the package python3-dev)")
fi
if ! command -v "${CXX:-g++}" >/dev/null && ! command -v clang++ >/dev/null; then
    missing+=("a C++ compiler, g++ or clang++ (vLLM compiles a part of its sampler at first use)")
fi

if ((${#missing[@]})); then
    echo "make setup: this machine lacks" >&2
    printf '  - %s\n' "${missing[@]}" >&2
    exit 1
fi
