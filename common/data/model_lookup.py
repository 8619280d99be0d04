"""Lookups of a model's folder or hub name before anything slow: it exists, its configuration, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.config.base import ConfigError
from common.error_text import one_line
from common.models.positions import sequence_limit

HUB_TIMEOUT_S = 5
"""Limit for the hub's answer to one request. Its client's own download retries for 23 s per file without a network."""


PREPARED = "models"
"""Folder that `opcd prepare` writes the examples' models into."""


def looks_like_path(model: str) -> bool:
    """True if `model` cannot be a hub name. `OWNER/NAME` is a path if `OWNER` is a local folder, or `PREPARED`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return True
    parent = Path(model).parent
    return "/" in model and (parent == Path(PREPARED) or parent.is_dir())


def is_cached(model: str) -> bool:
    """True if the hub's local cache holds the model's configuration."""
    from huggingface_hub import try_to_load_from_cache

    return not looks_like_path(model) and isinstance(try_to_load_from_cache(model, "config.json"), str)


def require_model(model: str) -> None:
    """Raise ConfigError, one line and within seconds, unless `model` is a folder or a model of the hub.

    A hub model must be in the local cache, or be one that the hub lets this user read.
    """
    if Path(model).is_dir():
        return
    fault = f"no model at {model}: no such folder (seen from {Path.cwd()})"
    if looks_like_path(model):
        remedy = "; opcd prepare writes the examples' models there" if Path(model).parent == Path(PREPARED) else ""
        raise ConfigError(fault + remedy)
    if is_cached(model):
        return
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the client passes on the exceptions of its HTTP library
        raise ConfigError(
            f"{fault}, not in the local Hugging Face cache, and the hub does not provide it: {one_line(error)[:200]}"
        ) from error


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a folder or hub name. Raises ConfigError if there is none."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, model, "tokenizer")
    # Without its files, some classes make a tokenizer with an empty vocabulary, to which every text is empty.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ConfigError(f"no tokenizer at {model}: its files (tokenizer.json) are missing, or know no letter")
    return tokenizer


def load_full_config(model: str) -> Any:
    """Load the configuration of a folder or hub name. Raises ConfigError if there is none."""
    from transformers import AutoConfig

    return _load(AutoConfig, model, "model configuration")


def load_model_config(model: str) -> Any:
    """Load the configuration of a folder's or hub name's text model. Raises ConfigError if there is none."""
    return load_full_config(model).get_text_config()


def model_limit(model: str) -> int | None:
    """Return the longest sequence of a model in tokens; None if its configuration states none."""
    return sequence_limit(load_model_config(model))


def _load(loader: Any, model: str, kind: str) -> Any:
    require_model(model)
    try:
        return loader.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # of json, safetensors, tokenizers and the hub's client, with no common base
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{model} brings its own Python code (auto_map in config.json), which opcd does not run: use a model "
                "of a class that transformers has"
            ) from error
        raise ConfigError(f"no {kind} at {model}: {one_line(error)}") from error
