"""Identity of the model behind an endpoint, found by asking: names, tokenizer, and the log-probs of a fixed text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from common.protocol.schema import F32, Ids, as_ids
from teacher_server.backends.base import BackendError

PROBE_TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969, two people walked on the Moon; their computer had 4 KB of "
    "memory.\n\ndef area(r):\n    return 3.14159 * r ** 2\n\nNaïve café, Straße, Москва, 東京, العربية, 🙂."
)
VOCABULARY_SAMPLES = 256
"""Tokens of the vocabulary, at even strides, whose texts follow `PROBE_TEXT` in the tokenizers' comparison."""
PROBE_TOKENS = 64
"""Tokens of the probe whose log-probs are compared."""

RMS_NATS = {"float32": 1e-4, "bfloat16": 0.15}
"""Allowed rms difference of the probe's log-probs between two answers, by the endpoint's dtype. In bfloat16 it is that
of the parity of engine and learner (`learner.loop.parity`)."""

ROUNDED_NATS = 0.1
"""Step that the probe's mean log-prob is rounded to in the fingerprint. Noise of a few thousandths (bfloat16) rarely
crosses a step, and another model's mean rarely falls into the same one."""


class ModelCard(msgspec.Struct):
    """An entry of ``GET /v1/models``."""

    id: str
    root: str | None = None
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[ModelCard]


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """The model behind an endpoint: its entry in the list, the server's fingerprint of its settings (None if the server
    gives none), and the log-probs of the probe's tokens ``[T]``.
    """

    card: ModelCard
    system_fingerprint: str | None
    logprobs: F32

    def fingerprint(self, tokenizer_fingerprint: str) -> str:
        """Hex sha256 of what identifies the model, with the mean log-prob in steps of `ROUNDED_NATS`."""
        mean = round(float(self.logprobs.mean(dtype=np.float64)) / ROUNDED_NATS)
        parts = [self.card.id, self.card.root, self.system_fingerprint, tokenizer_fingerprint, mean]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def change(self, now: Identity, dtype: str) -> str | None:
        """Explain why `now` is another model; None if it is the same one."""
        if now.card != self.card:
            return f"it served {_described(self.card)} and serves {_described(now.card)} now"
        if now.system_fingerprint != self.system_fingerprint:
            return f"its system_fingerprint was {self.system_fingerprint} and is {now.system_fingerprint} now"
        rms, bound = rms_difference(self.logprobs, now.logprobs), RMS_NATS[dtype]
        if not rms <= bound:
            return f"the log-probs of a fixed text moved by {rms:.3g} nats (rms), allowed are {bound:g} in {dtype}"
        return None


def rms_difference(first: F32, second: F32) -> float:
    """Root of the mean squared difference, in nats."""
    return float(np.sqrt(np.mean((first.astype(np.float64) - second) ** 2)))


def chosen_model(content: bytes, wanted: str | None, address: str) -> ModelCard:
    """The entry of the `wanted` model, or of the only one, in a reply of ``GET /v1/models``. Raises BackendError."""
    try:
        cards = msgspec.json.decode(content, type=_ModelList).data
    except (msgspec.DecodeError, RecursionError) as error:
        raise BackendError(f"the endpoint {address} does not list its models: {str(error)[:100]}") from error
    names = ", ".join(card.id for card in cards[:10]) or "none"
    if wanted is None and len(cards) == 1:
        return cards[0]
    found = [card for card in cards if card.id == wanted]
    if wanted is None:
        raise BackendError(f"the endpoint {address} serves several models ({names}): set teacher.endpoint_model to one")
    if not found:
        raise BackendError(f"the endpoint {address} serves {names}, and not teacher.endpoint_model {wanted}")
    return found[0]


def tokenizer_text(tokenizer: Any) -> str:
    """Text that the endpoint's tokenizer and ours must turn into the same ids: sentences, and texts of tokens from all
    parts of the vocabulary, added ones included.
    """
    size = len(tokenizer)
    ids = np.unique(np.linspace(0, size - 1, VOCABULARY_SAMPLES).astype(int)).tolist()
    return PROBE_TEXT + "".join(tokenizer.decode([index]) for index in ids)


def probe_ids(tokenizer: Any) -> Ids:
    """The tokens of `PROBE_TEXT` that are scored, at most `PROBE_TOKENS` after the first one."""
    return as_ids(tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"][: PROBE_TOKENS + 1])


def check_determinism(score: Callable[[Sequence[Ids]], Sequence[F32]], ids: Ids, dtype: str, address: str) -> None:
    """Check that the log-probs of the probe do not depend on what else the endpoint computes. Raises BackendError.

    `score` returns the log-probs of the tokens after the first one of several sequences, which it asks for at once.
    """
    (alone,) = score([ids])
    halves = [ids[: 2 + ids.size // 2], ids[::-1]]
    company = [ids, *halves] * 5
    for sequence, scored in zip(company, score(company), strict=True):
        if sequence is ids and not (rms := rms_difference(alone, scored)) <= RMS_NATS[dtype]:
            raise BackendError(
                f"the endpoint {address} scores the same text differently alone and among other requests, by {rms:.3g} "
                f"nats (rms), allowed are {RMS_NATS[dtype]:g} in {dtype}: set teacher.dtype to what the endpoint "
                "computes in, or use another backend"
            )


def _described(card: ModelCard) -> str:
    return f"{card.id} ({card.root}, {card.max_model_len} tokens)"
