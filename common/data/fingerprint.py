"""Fingerprints of a tokenizer and its chat template, which student and teacher compare."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of the vocabulary (token to id, added tokens included) and the special ids.

    Output width and chat template do not count: models of one family pad the width differently and share all tokens.
    """
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk")}
    return _digest({"vocabulary": sorted(tokenizer.get_vocab().items()), "special": special})


def chat_template_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of the chat template, or of the empty string for a tokenizer without one."""
    return _digest(tokenizer.chat_template or "")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
