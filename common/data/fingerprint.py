"""Names for what must be the same on both sides: the tokenizer's vocabulary and, less strictly, its chat template."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of the vocabulary (token -> id, added tokens included) and of the special ids.

    Widths of output layers and chat templates are no part of it: sizes of one family pad differently and still share
    their tokens.
    """
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk")}
    return _digest({"vocabulary": sorted(tokenizer.get_vocab().items()), "special": special})


def chat_template_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of the chat template; of nothing where there is none."""
    return _digest(tokenizer.chat_template or "")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
