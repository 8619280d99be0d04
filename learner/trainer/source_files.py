"""The files of a model's folder that are not weights. An export takes them over, so it is served like its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_PATTERNS = [*(f"*{suffix}" for suffix in _SUFFIXES), *(f"{name}*" for name in _NAMES)]
_BELOW = (".py", ".jinja")
"""Files of a folder's folders: code of the model, further chat templates."""
MAX_FILE_BYTES = 256 * 1024 * 1024
"""Larger than any tokenizer; a data set that lies next to a model is none of its files."""


def read_source_files(model: str) -> dict[str, bytes]:
    """Content by relative path of configuration, tokenizer, processor and code of `model`, a folder or a hub name.

    Reads them before training, so that an export depends neither on the network nor on what the folder holds by then.
    Raises OSError, also if the hub has to be asked and does not answer.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=_PATTERNS))
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if _belongs(path.relative_to(folder)) and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
    }


def _belongs(path: Path) -> bool:
    if any(part.startswith(".") for part in path.parts) or path.name.endswith(".index.json"):
        return False
    if len(path.parts) > 1:
        return path.suffix in _BELOW
    return path.suffix in _SUFFIXES or path.name.startswith(_NAMES)


def exported_files(source: Mapping[str, bytes], dtype: str) -> dict[str, bytes]:
    """The files of an export with weights of `dtype`: those of `source`, with the keys that transformers 4 reads added.

    All other files and keys stay as they are.
    """
    files = dict(source)
    if CONFIG in files:
        config = json.loads(files[CONFIG])
        files[CONFIG] = _changed(files[CONFIG], with_older_rope_keys(with_dtype(config, dtype)))
    if TOKENIZER_CONFIG in files:
        config = json.loads(files[TOKENIZER_CONFIG])
        files[TOKENIZER_CONFIG] = _changed(files[TOKENIZER_CONFIG], with_older_tokenizer_keys(config))
    return files


def _changed(before: bytes, config: Mapping[str, Any]) -> bytes:
    """`config` as a file; the file's own bytes if it says the same."""
    return (
        before if json.loads(before) == config else (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    )


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`config` with the weights' dtype under the name, or names, that it uses for it."""
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return {**config, **dict.fromkeys(names, dtype)}


def with_older_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with ``rope_theta`` and ``rope_scaling`` next to ``rope_parameters``.

    transformers 4 does not read the latter: it takes a default base, and is wrong by nats a token without an error.
    A configuration that has the older keys, as most on the hub do, stays as it is. So does one that transformers 5
    would then read otherwise.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping) or "rope_theta" in config:
        return dict(config)
    by_layer = parameters.get("full_attention")
    whole = by_layer if isinstance(by_layer, Mapping) else parameters
    added: dict[str, Any] = {}
    if "rope_theta" in whole:
        added["rope_theta"] = whole["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        added["rope_scaling"] = {name: value for name, value in whole.items() if name != "rope_theta"}
    if "partial_rotary_factor" in whole and "partial_rotary_factor" not in config:
        added["partial_rotary_factor"] = whole["partial_rotary_factor"]
    sliding = parameters.get("sliding_attention")
    if isinstance(sliding, Mapping) and "rope_theta" in sliding:
        added["rope_local_base_freq"] = sliding["rope_theta"]
    extended = {**config, **added}
    return extended if _read_alike(extended, config) else dict(config)


def _read_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if the installed transformers reads the same rope parameters; False for an architecture unknown to it."""
    from transformers import CONFIG_MAPPING

    if other.get("model_type") not in CONFIG_MAPPING:
        return False
    first, second = (CONFIG_MAPPING[other["model_type"]].from_dict(deepcopy(dict(config))) for config in (one, other))
    return bool(first.rope_parameters == second.rope_parameters)


def with_older_tokenizer_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's configuration in the names that transformers 4 and 5 both read."""
    changed = dict(config)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed


def check_reading(folder: Path, source: str) -> None:
    """Raise OSError if transformers reads another configuration or tokenizer from an export than from its source.

    An adapter's folder has neither.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not (folder / CONFIG).exists():
        return
    read = [AutoConfig.from_pretrained(name).to_dict() for name in (folder, source)]
    different = [key for key in read[1] if key not in ("dtype", "_name_or_path") and read[0].get(key) != read[1][key]]
    if different:
        raise OSError(f"{folder / CONFIG} is read otherwise than that of {source}: {', '.join(different)}")
    found, expected = (AutoTokenizer.from_pretrained(name) for name in (folder, source))
    if any(getattr(found, part) != getattr(expected, part) for part in ("special_tokens_map", "chat_template")) or (
        found.get_vocab() != expected.get_vocab()
    ):
        raise OSError(f"the tokenizer in {folder} is read otherwise than that of {source}")
