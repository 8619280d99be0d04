"""Requests and replies of vLLM's ``/inference/v1/generate`` with log-probs of given ids: every mode, cached contexts.

The route needs ``vllm serve --enable-scale-out`` and the V2 model runner, which vLLM uses on GPUs. It scores the given
ids (``prompt_logprob_token_ids``) for the response's tokens alone, and may read the prefix cache: V2 computes no row of
a token that it reads from the cache, and returns nothing rather than unwritten rows. V1, on CPU, would return them, so
the route serves no scores there (`RemoteBackend`).
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import msgspec
import numpy as np

from common.protocol.schema import Ids
from teacher_server.backends.base import Work
from teacher_server.backends.remote import completions
from teacher_server.backends.remote.prompt_rows import Values, fixed_id_rows, top_k_rows, union_rows
from teacher_server.backends.rows import InvalidRows, Rows, support_of

PATH = "/inference/v1/generate"


class Reply(msgspec.Struct):
    """A reply to one prompt."""

    model: str | None = None
    prompt_logprobs: list[msgspec.Raw] | None = None
    prompt_token_id_logprobs: str | None = None


def decode_reply(content: bytes) -> Reply:
    """Raises InvalidRows for anything else."""
    try:
        return msgspec.json.decode(content, type=Reply)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRows(f"the reply is no result of {PATH}: {str(error)[:100]}") from error


def request_body(model: str, ids: Ids, work: Work, vocab_size: int, salt: str | None) -> dict[str, Any]:
    """Body of a request for the scores of an item, whose whole sequence `ids` is.

    `salt` names the part of the prefix cache that the request reads and writes; None reads nothing.
    """
    sampling: dict[str, Any] = {
        "max_tokens": 1,
        "temperature": 0,
        "detokenize": False,
        "skip_reading_prefix_cache": salt is None,
    }
    if work.mode == "teacher_topk":
        sampling["prompt_logprobs"] = work.k
    else:
        fixed = np.concatenate([work.item.response_ids[:, None], support_of(work)], axis=1).astype(np.int64)
        sampling["prompt_logprob_token_ids"] = np.where(fixed < vocab_size, fixed, -1).tolist()  # -1 scores -inf
        sampling["prompt_logprob_start"] = int(ids.size - work.item.response_ids.size) - 1
        if work.mode == "union":
            sampling["prompt_logprobs"] = work.k
    body = {"model": model, "token_ids": ids.tolist(), "sampling_params": sampling}
    return body if salt is None else {**body, "cache_salt": salt}


def prefill_body(model: str, ids: Ids, salt: str) -> dict[str, Any]:
    """Body of a request that only computes `ids` into the prefix cache."""
    sampling = {"max_tokens": 1, "temperature": 0, "detokenize": False}
    return {"model": model, "token_ids": ids.tolist(), "sampling_params": sampling, "cache_salt": salt}


def max_reply_bytes(work: Work, tokens: int) -> int:
    """Upper bound for a reply to an item of `tokens` in all: JSON rows, and f32 values in base64."""
    rows = completions.max_reply_bytes(tokens, work.teacher_ids) if work.teacher_ids else completions.REPLY_BYTES
    return rows + 8 * int(work.item.response_ids.size) * (1 + support_of(work).shape[1])


def rows_of(reply: Reply, work: Work, vocab_size: int) -> Rows:
    """Rows of an item. Raises InvalidRows."""
    following = work.item.response_ids
    top = None
    if work.teacher_ids:
        found = reply.prompt_logprobs or []
        # The first row is null; rows of cached tokens are missing.
        if len(found) <= following.size:
            raise InvalidRows(f"the reply has {len(found)} rows, the last {following.size} are needed")
        top = top_k_rows(found[-following.size :], following, work.teacher_ids, vocab_size)
        if work.mode == "teacher_topk":
            return top
    values = _array(reply.prompt_token_id_logprobs)
    shape = (following.size, 1 + support_of(work).shape[1])
    if values.shape != shape:
        raise InvalidRows(f"scores of shape {list(values.shape)}, expected {list(shape)}")
    fixed = fixed_id_rows(values[:, 0], values[:, 1:], following, support_of(work), vocab_size)
    return fixed if top is None else union_rows(fixed, support_of(work), top, vocab_size)


def _array(text: str | None) -> Values:
    """The f32 array that vLLM packs as ``.npy`` in base64, as f64. Raises InvalidRows."""
    if text is None:
        raise InvalidRows("the reply holds no scores: the first ones were in the endpoint's prefix cache")
    try:
        array = np.lib.format.read_array(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, OSError) as error:
        raise InvalidRows(f"the reply's scores are no array: {str(error)[:100]}") from error
    if array.dtype != np.float32:
        raise InvalidRows(f"the reply's scores are {array.dtype}, not float32")
    return array.astype(np.float64)
