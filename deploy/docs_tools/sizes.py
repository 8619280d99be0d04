"""Writes the memory table of ``docs/cluster.md``: ``python -m deploy.docs_tools.sizes [--check]``.

The numbers are those of `common.sizing`, which ``opcd doctor CONFIG`` and ``--dry-run`` print for a configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common.config.loader import validate
from common.config.model import Config
from common.sizing.disk import state_bytes
from common.sizing.machine import GIB
from common.sizing.memory import CUDA_BYTES, longest_trainable, rank_need
from common.sizing.model_size import ModelSize, size_of
from deploy.docs_tools.pages import with_table, write_or_check

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
BEGIN, END = "<!-- sizes: written by `python -m deploy.docs_tools.sizes` -->\n", "<!-- end of sizes -->\n"

RANKS = (1, 2, 4, 8)
GPU_GIB = 79.6
"""Memory of a GPU that is sold as 80 GB."""

QWEN3 = {
    "1.7B": {"layers": 28, "hidden": 2048, "inner": 6144, "heads": 16, "tied": True},
    "4B": {"layers": 36, "hidden": 2560, "inner": 9728, "heads": 32, "tied": True},
    "8B": {"layers": 36, "hidden": 4096, "inner": 12288, "heads": 32, "tied": False},
    "14B": {"layers": 40, "hidden": 5120, "inner": 17408, "heads": 40, "tied": False},
    "32B": {"layers": 64, "hidden": 5120, "inner": 25600, "heads": 64, "tied": False},
}
"""Qwen 3 by size: the table's examples. All have 8 key heads of 128 and 151,936 token ids."""


def qwen3(name: str) -> ModelSize:
    """Sizes of a Qwen 3 model of `QWEN3`."""
    shape = QWEN3[name]
    config = {
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": shape["inner"],
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": shape["tied"],
    }
    found = size_of(config, _shapes(config))
    assert found is not None
    return found


def _shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    table = (config["vocab_size"], hidden)
    return {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (hidden,),
        "lm_head.weight": table,
        **{
            f"model.layers.{number}.{name}.weight": shape
            for number in range(config["num_hidden_layers"])
            for name, shape in layer.items()
        },
    }


def table() -> str:
    """The table as Markdown."""
    head = " | ".join(f"{ranks} rank{'s' * (ranks > 1)}" for ranks in RANKS)
    lines = [
        f"| Qwen 3 | {head} | longest sequence on 4 ranks | on 8 ranks | a checkpoint on disk |",
        "|---|" + "---|" * (len(RANKS) + 3),
    ]
    for name in QWEN3:
        model = qwen3(name)
        cells = [f"{rank_need(_config(ranks), model, 0).total / GIB:.0f}" for ranks in RANKS]
        cells += [_longest(model, ranks) for ranks in (4, 8)]
        cells.append(f"{state_bytes(_config(8), model) / GIB:.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _config(ranks: int) -> Config:
    learner = {"ranks": ranks, "gpus_per_rank": 1, "zero_stage": 3, "gradient_checkpointing": True}
    sections = {"run": {"name": "sizes"}, "student": {"model": "unused"}, "learner": learner}
    return validate(Config, {**sections, "context": {"text": "unused"}, "data": {"train": "unused"}})


def _longest(model: ModelSize, ranks: int) -> str:
    tokens = longest_trainable(_config(ranks), model, int(GPU_GIB * GIB) - CUDA_BYTES)
    return f"{round(tokens, -3):,}" if tokens else "does not fit"


def page() -> str:
    """The page with a current table."""
    return with_table(PAGE.read_text(encoding="utf-8"), BEGIN, END, table())


def main(arguments: list[str]) -> int:
    """Write or check the page."""
    return write_or_check(PAGE, page(), arguments, command="python -m deploy.docs_tools.sizes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
