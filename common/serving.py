"""The command that serves an export through vLLM's server, with OpenAI's API."""

from __future__ import annotations

import json
from pathlib import Path

from common.config.base import ConfigError

SERVER = "vllm.entrypoints.openai.api_server"
"""Module of vLLM's server. ``vllm serve`` starts the same, but fails in the CPU build, a package of another name."""
CPU_CACHE_BYTES = 2 * 1024**3
"""Key-value cache of a server on CPU."""
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for ``--max-lora-rank``."""


def exported_weights(run: Path, weights: str | None = None) -> Path:
    """The export `weights` of a run's folder, default ``checkpoint``, else ``best``. Raises ConfigError without one."""
    names = (weights,) if weights is not None else ("checkpoint", "best")
    for name in names:
        if any((run / name / file).is_file() for file in ("config.json", "adapter_config.json")):
            return run / name
    raise ConfigError(f"{run} holds no weights to serve: no model in {' or '.join(f'{name}/' for name in names)}")


def server_arguments(folder: Path, name: str, *, gpu: bool) -> list[str]:
    """Arguments of `SERVER` that serve the export `folder` as the model `name`.

    vLLM would halve the precision of float32 weights, so the dtype is named. On CPU it would ask for 92% of the memory,
    so the cache's size is named. An adapter is served on its base model.
    """
    memory = [] if gpu else ["--kv-cache-memory-bytes", str(CPU_CACHE_BYTES)]
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        config = json.loads(adapter.read_text(encoding="utf-8"))
        rank = next(rank for rank in _LORA_RANKS if rank >= config["r"])
        lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={folder}"]
        return ["--model", config["base_model_name_or_path"], *lora, *memory]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype") or "auto"
    return ["--model", str(folder), "--served-model-name", name, "--dtype", dtype, *memory]
