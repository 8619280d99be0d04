"""The arithmetic of `common.sizing` against the resident memory of real ranks on CPU, and their checkpoints on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.sizing.disk import state_bytes
from common.sizing.memory import rank_need
from common.sizing.model_size import read_model_size
from tests.support.rank_memory import PROMPT_TOKENS, RESPONSE_TOKENS, measure
from tests.support.scored import learner_config
from tests.support.tiny import make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33M parameters: enough that noise of a few MB is small."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stage", "dtype", "ranks", "low", "high"),
    [(0, "float32", 1, 0.9, 1.1), (2, "bfloat16", 1, 0.9, 1.1), (3, "bfloat16", 1, 0.9, 1.1)],
)
def test_a_rank_takes_the_memory_and_the_disk_that_the_table_says(
    stage: int, dtype: str, ranks: int, low: float, high: float, model: Path
) -> None:
    learner: dict[str, Any] = {"zero_stage": stage, "ranks": ranks, "micro_batch_tokens": 64}
    size = read_model_size(str(model))
    assert size is not None
    config = learner_config(model, learner=learner, student={"dtype": dtype})
    need = rank_need(config, size, PROMPT_TOKENS + RESPONSE_TOKENS, PROMPT_TOKENS + RESPONSE_TOKENS)
    measured = measure(model, learner, dtype, ranks)
    assert low < measured["peak"] / need.total < high
    assert measured["state"] == pytest.approx(state_bytes(config, size), rel=0.02)
