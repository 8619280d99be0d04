"""The choice of a model's forward path: the fastest whose scores are those of the model's own forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.float32_head import float32_linear
from common.models.logits import LogitTransform
from common.protocol.schema import ForwardPathName, Ids, as_ids
from teacher_server.backends.base import BackendError
from teacher_server.backends.hf.attention import obstacle
from teacher_server.backends.hf.packing import PrefixedSequence
from teacher_server.backends.hf.plain import CachePath, FullPath
from teacher_server.backends.hf.shared_prefix import SharedPrefixPath

log = logging.getLogger(__name__)

FLOAT32_NATS = 1e-3
"""Allowed difference (rms) from the model's own forward pass in float32; orders of summation differ by 1e-5."""
HALF_NATS = (0.02, 0.25)
"""Bounds of the allowed difference in bfloat16 and float16, which is `NOISE_FACTOR` times the model's noise: the
difference (rms) between its own attention and its eager attention."""
NOISE_FACTOR = 2.0
CHECK_TOKENS = 96


class ForwardPath(Protocol):
    """Computes the hidden states that predict responses, after contexts that it may compute once."""

    name: ForwardPathName
    cost: str

    def prefill(self, parts: Sequence[Ids], parent: Any) -> list[Any]:
        """States of the prefixes ``parent + parts[0]``, ``parent + parts[0] + parts[1]``, ..."""
        ...

    def prefix_bytes(self, tokens: int) -> int:
        """Upper bound of the bytes of a prefix of `tokens` tokens, parents excluded."""
        ...

    def passes(self, sequences: Sequence[PrefixedSequence]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yield, pass by pass, the indices of its sequences and their hidden states ``[T, d]``."""
        ...


def choose_path(model: Any, transform: LogitTransform, max_sequence_tokens: int, prefill_tokens: int) -> ForwardPath:
    """Return the first path that passes the check: shared prefixes, transformers' cache, full forward passes.

    Raises BackendError if even full passes over several padded rows, and over one row, differ from each other.
    """
    check = _PathCheck(model, transform, max_sequence_tokens)
    reason = obstacle(model.config.get_text_config())
    attention = model.config._attn_implementation
    if reason is None:
        try:
            path = SharedPrefixPath(model, prefill_tokens)
            if (reason := check.fault(path)) is None:
                return path
        except _ERRORS as error:  # errors of models not written for it
            reason = f"{type(error).__name__}: {error}"
        model.set_attn_implementation(attention)
    name = type(model).__name__
    log.warning("%s: contexts are not shared in place: %s", name, reason)
    try:
        cached = CachePath(model, prefill_tokens)
        cached.measure(check.ids)
        if (reason := check.fault(cached)) is None:
            log.warning("%s goes through transformers' cache: %s", name, cached.cost)
            return cached
    except _ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
    log.warning("%s goes through full forward passes: %s (not its cache: %s)", name, FullPath.cost, reason)
    for alone in (False, True):
        full = FullPath(model, alone=alone)
        if (reason := check.fault(full)) is None:
            return full
        log.warning("%s: rows of a padded batch differ from rows alone: %s", name, reason)
    raise BackendError(f"{name}: full forward passes do not repeat the model's own: {reason}")


_ERRORS = (
    AttributeError,
    AssertionError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _PathCheck:
    """Scores of random tokens by the model's own forward pass, and the noise of that pass."""

    def __init__(self, model: Any, transform: LogitTransform, max_sequence_tokens: int) -> None:
        self._model, self._transform = model, transform
        vocabulary = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
        length = min(CHECK_TOKENS, max_sequence_tokens)
        self.ids = as_ids(np.random.default_rng(0).integers(0, vocabulary, length))
        self._own = self._plain()
        self._allowed = FLOAT32_NATS
        if model.dtype != torch.float32:
            self._allowed = float(np.clip(NOISE_FACTOR * self._noise(), *HALF_NATS))

    def fault(self, path: ForwardPath) -> str | None:
        """Return how the scores of `path` differ from the model's own, or None.

        Three answers share one pass: over a context and its child with a prompt and without, and without context.
        """
        ids = self.ids
        a, b, c = len(ids) // 4, len(ids) // 2, 5 * len(ids) // 8
        with torch.inference_mode():
            _, child = path.prefill([ids[:a], ids[a:b]], None)
            sequences = [
                PrefixedSequence(child, ids[b:c], ids[c:]),
                PrefixedSequence(child, ids[:0], ids[b:]),
                PrefixedSequence(None, ids[:c], ids[c:]),
            ]
            found = {
                i: rows for chosen, states in path.passes(sequences) for i, rows in zip(chosen, states, strict=True)
            }
            scores = [self._scores(found[i], sequence.response) for i, sequence in enumerate(sequences)]
        errors = [_rms(got - self._own[-len(got) :]) for got in scores]
        if max(errors) <= self._allowed:  # False for NaN
            return None
        return (
            f"scores over a cached context differ from the model's own forward pass by {max(errors):.2g} nats (rms; at "
            f"most {self._allowed:.2g})"
        )

    def _plain(self) -> NDArray[np.float64]:
        with torch.inference_mode():
            tokens = torch.from_numpy(self.ids.astype(np.int64))[None].to(self._model.device)
            # The decoder alone: a multimodal model would read some of the random ids as places of images.
            hidden = self._model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
            return self._scores(hidden[:-1], self.ids[1:])

    def _scores(self, hidden: Tensor, response: Ids) -> NDArray[np.float64]:
        """Log-probs of `response`, ``[T]``, which ``hidden [T, d]`` predict."""
        head = self._model.get_output_embeddings()
        return _logprobs(self._transform(float32_linear(hidden, head.weight, getattr(head, "bias", None))), response)

    def _noise(self) -> float:
        """Difference (rms) between the model's own attention and eager attention; 0 if it has no other."""
        with _attention(self._model, "eager") as changed:
            return _rms(self._plain() - self._own) if changed else 0.0


@contextmanager
def _attention(model: Any, name: str) -> Iterator[bool]:
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield before != name
    finally:
        model.set_attn_implementation(before)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _logprobs(logits: Tensor, response: Ids) -> NDArray[np.float64]:
    index = torch.from_numpy(response.astype(np.int64))[:, None].to(logits.device)
    return logits.log_softmax(-1).gather(-1, index)[:, 0].double().cpu().numpy()
