"""Requests and replies of vLLM's ``/v1/completions`` with log-probs of the prompt's tokens.

A reply has a row (`prompt_rows`) for each token of the prompt after the first. vLLM reads no prefix cache for such a
request (``SamplingParams.skip_reading_prefix_cache``), so it computes every row.
"""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from common.protocol.schema import Ids
from teacher_server.backends.remote.prompt_rows import top_k_rows
from teacher_server.backends.rows import InvalidRows, Rows

PATH = "/v1/completions"

ENTRY_BYTES = 256
"""Upper bound for the JSON of one id of a row, on average over a reply: id, value, rank and the token's text."""

REPLY_BYTES = 64 * 1024
"""Upper bound for the rest of a reply."""


class _Choice(msgspec.Struct):
    prompt_logprobs: list[msgspec.Raw] | None = None
    prompt_token_ids: list[int] | None = None


class _Reply(msgspec.Struct):
    model: str
    choices: list[_Choice]
    system_fingerprint: str | None = None


class Reply:
    """A decoded reply to one prompt. Raises InvalidRows for anything else."""

    def __init__(self, content: bytes) -> None:
        try:
            reply = msgspec.json.decode(content, type=_Reply)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRows(f"the reply is no completion: {str(error)[:100]}") from error
        if len(reply.choices) != 1:
            raise InvalidRows(f"the reply has {len(reply.choices)} choices")
        self.model, self.system_fingerprint = reply.model, reply.system_fingerprint
        self.prompt_token_ids = reply.choices[0].prompt_token_ids
        self._rows = reply.choices[0].prompt_logprobs

    def rows(self, ids: Ids, *, tokens: int, k: int, vocab_size: int) -> Rows:
        """Rows of the last `tokens` of the prompt `ids`, at the teacher's `k` best ids. Raises InvalidRows."""
        if self._rows is None or len(self._rows) != ids.size:
            found = "no rows" if self._rows is None else f"{len(self._rows)} rows"
            raise InvalidRows(f"the reply has {found} for {ids.size} tokens")
        return top_k_rows(self._rows[-tokens:], ids[-tokens:], k, vocab_size)


def request_body(model: str, ids: Ids, k: int) -> dict[str, Any]:
    """Body of a request for the log-probs of the tokens of `ids`. vLLM generates one token, which is discarded.

    The salt keeps the ids out of the prefix cache of the endpoint's other users, who could find them by timing.
    """
    return {
        "model": model,
        "prompt": ids.tolist(),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": k,
        "cache_salt": uuid.uuid4().hex,
    }


def tokenize_body(model: str, text: str) -> dict[str, Any]:
    """Body of a request whose reply holds the ids of `text`."""
    return {"model": model, "prompt": text, "max_tokens": 1, "add_special_tokens": False, "return_token_ids": True}


def max_reply_bytes(tokens: int, k: int) -> int:
    """Upper bound for a reply to a prompt of `tokens`."""
    return REPLY_BYTES + tokens * (k + 1) * ENTRY_BYTES
