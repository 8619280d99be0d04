"""The model behind an endpoint: scores of sequences, and checks that it is the model that it should be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from common.models.positions import sequence_limit
from common.protocol.schema import F32, Ids, ScoreItem, as_ids
from teacher_server.backends.base import BackendError, Work
from teacher_server.backends.remote import completions, generate
from teacher_server.backends.remote.endpoint import Endpoint, RequestRefused
from teacher_server.backends.remote.probe import (
    PROBE_TEXT,
    RMS_NATS,
    Identity,
    ModelCard,
    chosen_model,
    rms_difference,
    tokenizer_text,
)
from teacher_server.backends.rows import InvalidRows, Rows

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

MAX_CONNECTIONS = 32
"""Requests to the endpoint at a time; it forms its own batches."""

REPLIES_BYTES = 2 * 1024**3
"""Bound on the replies that are received at a time."""

START_TIMEOUT_S = 8.0
"""Deadline for the endpoint's first reply."""

MODELS_BYTES = 1024 * 1024
"""Upper bound for the reply of ``GET /v1/models``."""


class EndpointModel:
    """A model of an endpoint. Methods raise EndpointError, and InvalidRows for a reply that is no score."""

    def __init__(self, endpoint: Endpoint, *, name: str | None, model_config: Any, timeout_s: float) -> None:
        """Choose the model called `name`, or the only one. `timeout_s` is the deadline of a request.

        Raises BackendError if there is none, EndpointError within `START_TIMEOUT_S`.
        """
        self.endpoint, self._name, self._timeout_s = endpoint, name, timeout_s
        self._pool = ThreadPoolExecutor(MAX_CONNECTIONS, "teacher-endpoint")
        self.vocab_size = int(model_config.vocab_size)
        self.fixed_ids = False
        """True if the endpoint scores given ids (`generate`), set by `check_modes`."""
        card = self._card(START_TIMEOUT_S)
        self.served_name = card.id
        limit = card.max_model_len or sequence_limit(model_config)
        if limit is None:
            raise BackendError(
                f"neither the endpoint {endpoint.address} nor teacher.model states the longest sequence: add "
                "max_position_embeddings to the model's config.json"
            )
        # vLLM generates one token for each request, which is discarded.
        self.max_sequence_tokens = int(limit) - 1

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(cancel_futures=True)
        self.endpoint.close()

    def rows(self, ids: Ids, *, tokens: int, k: int) -> tuple[Rows, str | None]:
        """Rows of the last `tokens` of `ids` at the model's `k` best ids, and the reply's ``system_fingerprint``."""
        body = completions.request_body(self.served_name, ids, k)
        reply = self._post(body, completions.max_reply_bytes(int(ids.size), k))
        return reply.rows(ids, tokens=tokens, k=k, vocab_size=self.vocab_size), reply.system_fingerprint

    def score(self, work: Work, ids: Ids, *, salt: str | None) -> tuple[Rows, str | None]:
        """Rows of an item, whose whole sequence is `ids`, and the reply's ``system_fingerprint``, if it has one.

        `salt` names the part of the prefix cache that may hold the item's context; None reads nothing.
        """
        if not self.fixed_ids:
            return self.rows(ids, tokens=int(work.item.response_ids.size), k=work.teacher_ids)
        return self._given_ids(work, ids, salt), None

    def _given_ids(self, work: Work, ids: Ids, salt: str | None) -> Rows:
        body = generate.request_body(self.served_name, ids, work, self.vocab_size, salt)
        max_bytes = generate.max_reply_bytes(work, int(ids.size))
        reply = generate.decode_reply(
            self.endpoint.send(generate.PATH, body, max_bytes=max_bytes, timeout_s=self._timeout_s)
        )
        self._check_name(reply.model)
        return generate.rows_of(reply, work, self.vocab_size)

    def prefill(self, ids: Ids, salt: str) -> None:
        """Have the endpoint compute `ids` into its prefix cache."""
        body = generate.prefill_body(self.served_name, ids, salt)
        self.endpoint.send(generate.PATH, body, max_bytes=completions.REPLY_BYTES, timeout_s=self._timeout_s)

    def sampled_logprobs(self, sequences: Sequence[Ids]) -> list[F32]:
        """Log-probs of all tokens but the first of each sequence, all asked for at once."""
        return self.at_once(lambda ids: self.rows(ids, tokens=int(ids.size) - 1, k=0)[0].sampled, sequences, [1])

    def at_once(self, call: Callable[[T], R], arguments: Sequence[T], sizes: Sequence[int]) -> list[R]:
        """Results of `call` in order; at a time, as many calls as replies of the largest of `sizes` fit into memory."""
        results: list[R] = []
        fit = max(1, REPLIES_BYTES // max(sizes, default=1))
        step = fit if fit < MAX_CONNECTIONS else max(1, len(arguments))  # else the threads are the bound
        for start in range(0, len(arguments), step):
            results += self._pool.map(call, arguments[start : start + step])
        return results

    def identify(self, probe: Ids) -> Identity:
        """The model's entry in the list, and its log-probs of the probe. Raises BackendError too."""
        card = self._card(self._timeout_s)
        rows, system_fingerprint = self.rows(probe, tokens=int(probe.size) - 1, k=0)
        return Identity(card, system_fingerprint, rows.sampled)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Compare the ids of a text with those of our `tokenizer`. Raises BackendError."""
        text = tokenizer_text(tokenizer)
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ours) > self.max_sequence_tokens:
            text = PROBE_TEXT[: self.max_sequence_tokens // 4]  # a character has up to 4 tokens
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        body = completions.tokenize_body(self.served_name, text)
        theirs = self._post(body, completions.max_reply_bytes(len(ours), 0)).prompt_token_ids
        if theirs is None:
            raise BackendError(
                f"the endpoint {self.endpoint.address} returns no prompt_token_ids, which the check of its tokenizer "
                "needs: use vLLM 0.10.2 or later"
            )
        if theirs != ours:
            longest = max(len(ours), len(theirs))
            at = next(i for i in range(longest) if theirs[i : i + 1] != ours[i : i + 1])
            raise BackendError(
                f"the endpoint {self.endpoint.address} has another tokenizer than teacher.model: of the same text, id "
                f"number {at} is {theirs[at : at + 1]} there and {ours[at : at + 1]} here"
            )

    def check_modes(self, probe: Ids, max_k: int, dtype: str) -> None:
        """Score the probe at the most ids, and find out if the endpoint scores given ids. Raises BackendError."""
        k = min(max_k, self.vocab_size)
        try:
            rows, _ = self.rows(probe, tokens=int(probe.size) - 1, k=k)
        except RequestRefused as error:
            if error.status != 400:
                raise
            raise BackendError(
                f"{error}: start the endpoint with --max-logprobs {k}, or set teacher.max_k to what it takes"
            ) from error
        try:
            given = self._given_ids(_probe_work(probe, 1), probe, None)
        except (RequestRefused, InvalidRows) as error:
            log.info("the endpoint scores no given ids, only its own most likely ones: %s", error)
            return
        if not (rms := rms_difference(rows.sampled, given.sampled)) <= RMS_NATS[dtype]:
            raise BackendError(
                f"the endpoint {self.endpoint.address} gives the same text other log-probs at {generate.PATH} than at "
                f"{completions.PATH}, by {rms:.3g} nats (rms), allowed are {RMS_NATS[dtype]:g} in {dtype}"
            )
        try:
            self._given_ids(_probe_work(probe, k), probe, None)
        except RequestRefused as error:
            raise BackendError(
                f"{error}: start the endpoint with --max-logprobs {k + 1} (one for the token itself), or lower "
                "teacher.max_k"
            ) from error
        self.fixed_ids = True

    def _post(self, body: Any, max_bytes: int) -> completions.Reply:
        content = self.endpoint.send(completions.PATH, body, max_bytes=max_bytes, timeout_s=self._timeout_s)
        reply = completions.Reply(content)
        self._check_name(reply.model)
        return reply

    def _check_name(self, name: str | None) -> None:
        if name != self.served_name:
            raise InvalidRows(f"the reply is of the model {str(name)[:100]}, not of {self.served_name}")

    def _card(self, timeout_s: float) -> ModelCard:
        content = self.endpoint.send("/v1/models", max_bytes=MODELS_BYTES, timeout_s=timeout_s)
        return chosen_model(content, self._name, self.endpoint.address)


def _probe_work(probe: Ids, k: int) -> Work:
    """The probe as an item at the first `k` ids of the vocabulary."""
    support = as_ids(np.tile(np.arange(k), (probe.size - 1, 1)))
    return Work(ScoreItem(None, probe[:1], probe[1:], support), None, "at_ids", 1.0, 0)
