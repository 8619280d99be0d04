"""One check, before anything slow, that a model's folder or hub name exists."""

from __future__ import annotations

from pathlib import Path

from common.config.base import ConfigError

HUB_TIMEOUT_S = 5
"""Limit for the hub's answer to one request. Its client's own download retries for 23 s per file without a network."""


def require_model(model: str) -> None:
    """Raise ConfigError, one line and within seconds, unless `model` is a folder or a model of the hub.

    A hub model must be in the local cache, or be one that the hub lets this user read. `OWNER/NAME` counts as a path if
    there is a local folder `OWNER`.
    """
    if Path(model).is_dir():
        return
    fault = f"no model at {model}: no such folder (seen from {Path.cwd()})"
    if model.startswith(("/", "~")) or model.count("/") > 1 or ("/" in model and Path(model).parent.is_dir()):
        raise ConfigError(fault)
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
        HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
    except HFValidationError:  # no possible name on the hub
        raise ConfigError(fault) from None
    except Exception as error:  # the client passes on the exceptions of its HTTP library
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{fault}, not in the local Hugging Face cache, and the hub does not provide it: {reason}"
        ) from error
