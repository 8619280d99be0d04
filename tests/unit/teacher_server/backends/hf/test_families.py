"""Every family in the teacher: scores of a plain eager forward pass, whatever the path and the company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config.model import TeacherConfig
from common.models.logits import LogitTransform
from common.protocol.schema import ItemScore, as_ids
from teacher_server.backends.base import BackendError, Work
from teacher_server.backends.hf import backend as backend_module
from teacher_server.backends.hf import forward_path
from teacher_server.backends.hf.backend import TransformersBackend
from teacher_server.scoring.service import TeacherService, TokenizerIdentity
from tests.support.families import CORE, ORIGINAL, Families
from tests.support.teacher_oracle import Oracle, assert_score, random_item

LONGEST = 160
"""Tokens of the longest sequence, above every window and every original length."""
CONTEXT = as_ids(np.random.default_rng(7).integers(0, 500, 80))
PATHS = {
    "mistral-sliding": "cache",
    "gemma2": "cache",
    "gemma3-text": "cache",
    "olmo3": "cache",
    "gpt_oss": "cache",
    "qwen3_5-text": "cache",
    "granite4-hybrid": "cache",
    "stablelm": "cache",
    "mamba2": "full",
    "minimax": "full",
}
"""Families that the fast path does not fit; all others are on it."""


def load(folder: Path, dtype: str = "float32", limit: int = LONGEST) -> TransformersBackend:
    return TransformersBackend.load(str(folder), dtype=dtype, max_sequence_tokens=limit, prefill_tokens=64)


def works(backend: TransformersBackend) -> list[Work]:
    """Items without a context, under a context, and under its child: with and without a prompt, short and long."""
    rng = np.random.default_rng(0)
    (parent,) = backend.prefill([CONTEXT[:5]], None)
    (child,) = backend.prefill([CONTEXT[5:]], parent)
    sizes = (
        (None, 5, 9),
        (parent, 7, 12),
        (child, 7, 20),
        (child, 0, 12),
        (child, 0, 1),
        (child, 12, 33),
        (child, 4, 0),
    )
    return [Work(random_item(rng, prompt=p, response=r), prefix, "at_ids", 1.0, 8) for prefix, p, r in sizes]


@pytest.mark.parametrize("name", [*CORE, "mamba2", "minimax"])
def test_scores_are_those_of_a_plain_forward_pass(name: str, families: Families) -> None:
    backend = load(families / name)
    oracle = Oracle.load(families / name, pad_to=LONGEST)
    assert backend.path == PATHS.get(name, "shared_prefix")
    batch = works(backend)
    for work, score in zip(batch, backend.score(batch), strict=True):
        assert isinstance(score, ItemScore)
        context = CONTEXT[: 0 if work.prefix is None else work.prefix.total_tokens]
        assert_score(score, oracle.logprobs(context, work.item.prompt_ids, work.item.response_ids), work.item)
        (alone,) = backend.score([work])
        assert isinstance(alone, ItemScore)
        np.testing.assert_allclose(score.sampled_logprob, alone.sampled_logprob, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3-text", "granite4-hybrid", "mamba2"])
def test_a_state_that_was_on_the_host_scores_the_same(name: str, families: Families) -> None:
    backend = load(families / name)
    batch = works(backend)
    before = backend.score(batch)
    prefixes = [work.prefix for work in batch if work.prefix is not None]
    for prefix in prefixes:
        nbytes = prefix.nbytes
        prefix.to_host()
        prefix.to_device()
        assert prefix.nbytes == nbytes
    for one, other in zip(before, backend.score(batch), strict=True):
        assert isinstance(one, ItemScore)
        assert isinstance(other, ItemScore)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


@pytest.mark.parametrize("name", ["llama", "gemma3-text", "granite4-hybrid", "mamba2"])
def test_prefix_bytes_bound_what_a_context_takes(name: str, families: Families) -> None:
    backend = load(families / name)
    for tokens in (1, 10, 80):
        taken, bound = backend.prefill([CONTEXT[:tokens]], None)[0].nbytes, backend.prefix_bytes(tokens)
        assert taken <= bound
        assert tokens < 80 or bound <= 1.01 * taken


def test_longrope_takes_the_short_factors_if_no_sequence_is_long(families: Families) -> None:
    folder = families / "phi4-mini-longrope"
    backend, oracle = load(folder, limit=ORIGINAL), Oracle.load(folder)
    work = Work(random_item(np.random.default_rng(0), prompt=5, response=20), None, "at_ids", 1.0, 8)
    (score,) = backend.score([work])
    assert isinstance(score, ItemScore)
    assert_score(score, oracle.logprobs(as_ids([]), work.item.prompt_ids, work.item.response_ids), work.item)


def rms_from_own(backend: TransformersBackend, model: Any) -> float:
    errors = []
    batch = [work for work in works(backend) if work.item.response_ids.size]
    for work, score in zip(batch, backend.score(batch), strict=True):
        assert isinstance(score, ItemScore)
        context = CONTEXT[: 0 if work.prefix is None else work.prefix.total_tokens]
        logprobs = Oracle(model, LONGEST).logprobs(context, work.item.prompt_ids, work.item.response_ids)
        ids = torch.from_numpy(work.item.response_ids.astype(np.int64))[:, None]
        errors.append(score.sampled_logprob - logprobs.gather(-1, ids)[:, 0].numpy())
    return float(np.sqrt(np.mean(np.square(np.concatenate(errors)))))


@pytest.mark.parametrize(
    ("name", "path"), [("granite", "shared_prefix"), ("nanochat-softcap15", "shared_prefix"), ("gptj", "cache")]
)
def test_bfloat16_scores_are_within_rounding_of_the_models_own(name: str, path: str, families: Families) -> None:
    """A logit transform left out and attention outside transformers' interface were within half a nat here."""
    backend = load(families / name, dtype="bfloat16")
    assert backend.path == path
    model = AutoModelForCausalLM.from_pretrained(families / name, dtype=torch.bfloat16, attn_implementation="eager")
    assert rms_from_own(backend, model) < 0.05


@pytest.mark.parametrize("name", ["granite", "nanochat-softcap15"])
def test_an_unknown_logit_transform_is_refused_in_bfloat16(
    name: str, families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "logit_transform", lambda _: LogitTransform())
    with pytest.raises(BackendError, match="changes its logits"):
        load(families / name, dtype="bfloat16")


def test_a_path_that_is_wrong_is_not_taken(families: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions one too high under a cached context, in bfloat16: the numbers show it, not the structure."""
    right = forward_path.SharedPrefixPath._forward
    monkeypatch.setattr(
        forward_path.SharedPrefixPath, "_forward", lambda path, ids, at, plan: right(path, ids, at * 2, plan)
    )
    assert load(families / "llama", dtype="bfloat16").path == "cache"


def test_a_model_without_a_longest_sequence_needs_the_key(families: Families) -> None:
    with pytest.raises(BackendError, match=r"set teacher\.max_sequence_tokens"):
        TransformersBackend.load(str(families / "mamba2"))


def test_dynamic_positions_are_refused_where_they_change(families: Families) -> None:
    with pytest.raises(BackendError, match="set max_sequence_tokens to at most that, not 1024"):
        load(families / "llama-dynamic-ntk", limit=1024)


@pytest.mark.parametrize(("name", "path"), [("gemma2", "cache"), ("mamba2", "full")])
def test_info_and_log_say_which_path_serves_and_what_it_costs(
    name: str, path: str, families: Families, caplog: pytest.LogCaptureFixture
) -> None:
    backend = load(families / name)
    info = TeacherService(backend, TeacherConfig(), TokenizerIdentity("0" * 64, "0" * 64)).info()
    assert info.path == path
    assert len(info.path_cost) > 20
    assert any(info.path_cost in record.getMessage() for record in caplog.records)
