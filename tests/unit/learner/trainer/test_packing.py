"""Packed rows against one sequence per row: no sequence sees another, or the model is not packed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config.model import LossConfig
from common.protocol.schema import TokenSequence, as_ids
from learner.trainer import packing
from learner.trainer.batch_layout import PACKED, PADDED, SequenceBatch
from learner.trainer.micro_batch import build_micro_batch
from learner.trainer.objective import Objective
from learner.trainer.packing import PackingError, pack, packed_attention
from learner.trainer.policy import Policy
from tests.support.learner_oracle import relative_difference
from tests.support.scored import make_scored


def model(kind: str = "llama", **settings: Any) -> Any:
    """A random model of a family, with weights large enough that seeing other tokens matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.5,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **settings})).eval()


def sequences(*lengths: tuple[int, int], seed: int = 1) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    return [TokenSequence(*(as_ids(rng.integers(0, 64, n)) for n in pair)) for pair in lengths]


def states(some: Any, batch: SequenceBatch) -> Tensor:
    hidden = some.base_model(**batch.inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.positions].detach()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "granite", "cohere"])
def test_packed_hidden_states_are_those_of_each_sequence_alone(kind: str) -> None:
    some = model(kind)
    three = sequences((4, 6), (1, 1), (9, 3))
    alone = torch.cat([states(some, PADDED.lay_out([one])) for one in three])
    assert pack(some) is None
    torch.testing.assert_close(states(some, PACKED.lay_out(three)), alone, rtol=1e-4, atol=1e-5)
    # Another neighbour does not change even the last bit.
    others = [*sequences((4, 6), seed=2), *three[1:]]
    before, after = states(some, PACKED.lay_out(three)), states(some, PACKED.lay_out(others))
    assert not torch.equal(before[:6], after[:6])
    assert torch.equal(before[6:], after[6:])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_are_the_padded_ones(checkpointing: bool) -> None:
    scored = make_scored(7, vocabulary=64, k=8)
    grads = []
    for packed in (False, True):
        some = model("qwen3")
        if checkpointing:
            some.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = Policy(some, 5)
        policy.train()
        assert not packed or pack(some) is None
        layout = PACKED if packed else PADDED
        batch = build_micro_batch(scored, LossConfig(), layout)
        policy(batch, Objective(batch, LossConfig())).backward()
        grads.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert relative_difference(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("mistral", {"sliding_window": 4096}, "sliding_window"),
        ("gemma2", {}, "sliding_attention"),
        ("llama", {"attention_dropout": 0.5}, "dropout"),
        ("mamba", {"state_size": 4}, "linear_attention"),
        ("bloom", {"n_head": 2, "n_layer": 2}, "differ|Error"),
    ],
)
def test_a_model_that_packing_would_change_is_padded_and_says_why(
    kind: str, settings: dict[str, Any], reason: str
) -> None:
    some = model(kind, **settings)
    three = sequences((4, 6), (1, 1), (9, 3))
    before = states(some, PADDED.lay_out(three))
    some.train(kind == "llama")  # dropout acts in training mode
    assert re.search(reason, str(pack(some)))
    some.eval()
    assert torch.equal(states(some, PADDED.lay_out(three)), before)  # the model is unchanged


def test_attention_that_looks_across_a_border_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check protects against silently wrong gradients after a new version of transformers."""

    def leaky(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        whole = torch.tensor([0, query.shape[2]], dtype=torch.int32)
        return packed_attention(
            module, query, key, value, mask, scaling=kwargs["scaling"], cu_seq_lens_q=whole, max_length_q=int(whole[1])
        )

    monkeypatch.setattr(packing, "packed_attention", leaky)
    assert "hidden states differ" in str(pack(model()))


@pytest.mark.parametrize(
    "extra",
    [
        {"sliding_window": 8},
        {"softcap": 30.0},
        {"dropout": 0.1},
        {"s_aux": torch.zeros(2)},
        {"attention_mask": torch.zeros(1)},
        {"cu_seq_lens_q": None},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_unsupported_attention_arguments_are_refused(extra: dict[str, Any]) -> None:
    states = torch.zeros(1, 2, 5, 8)
    given: dict[str, Any] = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 2, 5]), "max_length_q": 3}
    packed_attention(torch.nn.Identity(), states, states, states, **given)
    with pytest.raises(PackingError):
        packed_attention(torch.nn.Identity(), states, states, states, **{**given, **extra})
