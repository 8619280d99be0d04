"""What the vLLM backend adds to vLLM's workers: rows of scores that carry the mass outside the support.

vLLM returns log-probs at ids, but not what is left outside of them, and `1 - sum` of f32 values is noise where little
is left. So a *worker extension* (``worker_extension_cls``) replaces the one function of each model runner that turns
logits into prompt log-probs by one that does the same with the code of the transformers backend, tail included.

Fixed-id rows (V2 runner), ``[n, 2 + w + 2k]``, in the place of the log-probs at the ids asked for:

    ids asked for:   response token | k      | support (w) | 0 (k)       | 0 (k)
    values returned: its log-prob   | tail   | log-probs   | teacher's k | their log-probs

Teacher-top-k rows (V1 runner), ``[n, 2 + k]``: token, the teacher's best k, and in the last column the tail.
Ids travel as f32, which holds every integer up to 2**24 exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.protocol.schema import ScoreMode
from teacher_server.backends.hf.outputs import CHUNK_BYTES, Values, score_logits

EXTENSION = f"{__name__}.ScoringExtension"

FIXED_COLUMNS = 2
"""Ahead of the support in a fixed-id row: the response token and k (in), its log-prob and the tail (out)."""


class ScoringExtension:
    """Mixed into vLLM's worker class; called through ``collective_rpc``."""

    model_runner: Any

    def opcd_install_scoring(self, fixed_ids: bool) -> None:
        """Put this module's functions in place of the model runner's, in this worker's process."""
        if fixed_ids:
            from vllm.v1.worker.gpu.sample import prompt_logprob

            prompt_logprob.compute_token_logprobs = fixed_id_rows
        else:
            from vllm.v1.outputs import LogprobsTensors

            LogprobsTensors.empty_cpu = staticmethod(_unwritten(LogprobsTensors.empty_cpu))
            self.model_runner.sampler.gather_logprobs = top_k_rows


def fixed_id_rows(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Rows ``[n, 2 + w + 2k]`` f32 of ``logits [n, V]`` at ``token_ids [n, 2 + w + 2k]``, all n of one request.

    Stands in for vLLM's ``compute_token_logprobs``. A row whose logits are no numbers is NaN.
    """
    k = int(token_ids[0, 1])
    width = token_ids.shape[1] - FIXED_COLUMNS - 2 * k
    support = token_ids[:, FIXED_COLUMNS : FIXED_COLUMNS + width]
    mode: ScoreMode = ("union" if k else "at_ids") if width else ("teacher_topk" if k else "sampled")
    parts = []
    for rows in _chunks(logits):
        ids = support[rows] if width else None
        own = logits[rows].to(torch.float32, copy=True)
        values = score_logits(own, sampled=token_ids[rows, 0], ids=ids, mode=mode, temperature=1.0, k=k)
        columns = [values.sampled[:, None], values.tail[:, None], values.logprobs[:, :width]]
        if values.ids is not None:
            columns += [values.ids[:, width:].float(), values.logprobs[:, width:]]
        parts.append(_numbers(values, torch.cat(columns, dim=1)))
    return torch.cat(parts)


def top_k_rows(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
    """The teacher's best ``num_logprobs - 1`` and the tail outside them, in the form of the V1 sampler's own
    ``gather_logprobs``: ``LogprobsTensors`` of ``[n, 1 + num_logprobs]``.
    """
    from vllm.v1.outputs import LogprobsTensors

    k = num_logprobs - 1
    ids, rows = [], []
    for chunk in _chunks(logprobs):
        sampled = token_ids[chunk]
        mode: ScoreMode = "teacher_topk" if k else "sampled"
        values = score_logits(logprobs[chunk].clone(), sampled=sampled, ids=None, mode=mode, temperature=1.0, k=k)
        picked = sampled.new_empty((sampled.shape[0], 0)) if values.ids is None else values.ids
        ids.append(torch.cat([sampled[:, None], picked, torch.zeros_like(sampled)[:, None]], dim=1))
        row = torch.cat([values.sampled[:, None], values.logprobs, values.tail[:, None]], dim=1)
        rows.append(_numbers(values, row))
    return LogprobsTensors(torch.cat(ids).to(torch.int32), torch.cat(rows), torch.zeros_like(token_ids))


def _unwritten(empty_cpu: Any) -> Any:
    """`empty_cpu` whose log-probs are NaN until they are written: the V1 runner leaves rows of cached positions out."""

    def marked(num_positions: int, num_tokens_per_position: int) -> Any:
        tensors = empty_cpu(num_positions, num_tokens_per_position)
        tensors.logprobs.fill_(float("nan"))
        return tensors

    return marked


def _numbers(values: Values, row: Tensor) -> Tensor:
    return row.masked_fill_(~values.finite[:, None], float("nan"))


def _chunks(logits: Tensor) -> list[slice]:
    """Slices of rows whose f32 copy stays under `CHUNK_BYTES`: vLLM sets no memory aside for it."""
    step = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]
