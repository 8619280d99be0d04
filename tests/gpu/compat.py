"""Differences of older torch releases: the check-up also runs on a machine whose torch is not the pinned one."""

from __future__ import annotations

import inspect
from typing import Any

from torch.nn.attention import varlen


def adapt_torch() -> None:
    """Before torch 2.12 `varlen_attn` took grouped keys without being told: let it accept ``enable_gqa``."""
    original: Any = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(original).parameters:
        return

    def varlen_attn(*arguments: Any, enable_gqa: bool = False, **options: Any) -> Any:
        return original(*arguments, **options)

    varlen.varlen_attn = varlen_attn
