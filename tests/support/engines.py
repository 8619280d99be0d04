"""A rollout engine of a tiny model."""

from __future__ import annotations

from pathlib import Path

from common.config.loader import validate
from common.config.model import Config

PROMPT = [48, 25, 220, 66, 64, 83, 198, 32, 25]


K = 64


def run_config(model: Path) -> Config:
    return validate(
        Config,
        {
            "run": {"name": "test"},
            "student": {"model": str(model), "max_sequence_tokens": 512},
            "context": {"text": "unused"},
            "data": {"train": "unused"},
            "rollout": {"threads": 1, "max_num_seqs": 16},
            "loss": {"top_k": K},
        },
    )
