"""One check, before anything slow, that a model's folder or hub name exists."""

from __future__ import annotations

from pathlib import Path

from common.config.base import ConfigError

HUB_TIMEOUT_S = 5
"""Limit for the hub's one answer. Its client retries a download for 23 s a file before it gives up."""


def require_model(model: str) -> None:
    """Raise ConfigError, in one line and within seconds, unless `model` is a folder or a model of the hub.

    A hub model counts if it is in the local cache or if the hub says that this user may read it.
    """
    if Path(model).is_dir():
        return
    if _is_path(model):
        raise ConfigError(f"no model at {model}: no such folder (seen from {Path.cwd()})")
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    try:
        HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the client passes on the exceptions of its HTTP library
        raise ConfigError(
            f"no model at {model}: no such folder (seen from {Path.cwd()}), not in the local Hugging Face cache, and "
            f"the hub does not give it: {' '.join(str(error).split())[:200]}"
        ) from error


def _is_path(model: str) -> bool:
    """Tell a path from a hub name: `NAME` or `OWNER/NAME`, with no local folder called `OWNER`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if model.startswith(("/", "~")) or model.count("/") > 1 or ("/" in model and Path(model).parent.is_dir()):
        return True
    try:
        validate_repo_id(model)
    except HFValidationError:
        return True
    return False
