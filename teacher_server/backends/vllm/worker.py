"""Worker extension for vLLM: rows of scores that include the tail, the log of the mass outside the support.

vLLM returns log-probs at ids but no tail, and `1 - sum` of f32 values is noise for a small tail. So the extension
(``worker_extension_cls``) replaces, in each model runner, the function that turns logits into prompt log-probs. The
replacement divides the logits by the temperature, which the engine sets before each run, and uses the code of the
transformers backend.

Fixed-id rows (V2 runner), ``[n, 2 + w + 2k]``:

    requested ids:   response token | k      | support (w) | 0 (k)       | 0 (k)
    returned values: its log-prob   | tail   | log-probs   | teacher's k | their log-probs

Teacher-top-k rows (V1 runner), ``[n, 2 + k]``: token, the teacher's best k, and the tail in the last column.
Ids travel as f32, which holds every integer up to 2**24 exactly.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.protocol.schema import ScoreMode
from teacher_server.backends.hf.outputs import CHUNK_BYTES, PositionScores, score_logits

EXTENSION = f"{__name__}.ScoringExtension"

FIXED_COLUMNS = 2
"""Columns before the support in a fixed-id row: response token and k in a request, log-prob and tail in a result."""


class ScoringExtension:
    """Mix-in of vLLM's worker class, called through ``collective_rpc``."""

    model_runner: Any

    def opcd_install_scoring(self, fixed_ids: bool) -> None:
        """Replace the model runner's function in this worker's process; it scores at temperature 1."""
        if not fixed_ids:
            from vllm.v1.outputs import LogprobsTensors

            LogprobsTensors.empty_cpu = staticmethod(nan_until_written(LogprobsTensors.empty_cpu))
        self.opcd_set_temperature(fixed_ids, 1.0)

    def opcd_set_temperature(self, fixed_ids: bool, temperature: float) -> None:
        """Score at `temperature` from the next request on. The engine must be idle."""
        if fixed_ids:
            from vllm.v1.worker.gpu.sample import prompt_logprob

            prompt_logprob.compute_token_logprobs = partial(fixed_id_rows, temperature=temperature)
        else:
            self.model_runner.sampler.gather_logprobs = partial(top_k_rows, temperature=temperature)


def fixed_id_rows(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Rows ``[n, 2 + w + 2k]`` f32 of ``logits [n, V]`` at ``token_ids [n, 2 + w + 2k]``, all of one request.

    Replaces vLLM's ``compute_token_logprobs``. A row with NaN or infinite logits is NaN.
    """
    k = int(token_ids[0, 1])
    width = token_ids.shape[1] - FIXED_COLUMNS - 2 * k
    support = token_ids[:, FIXED_COLUMNS : FIXED_COLUMNS + width]
    mode: ScoreMode = ("union" if k else "at_ids") if width else ("teacher_topk" if k else "sampled")
    parts = []
    for rows in _chunks(logits):
        ids = support[rows] if width else None
        own = logits[rows].to(torch.float32, copy=True)
        values = score_logits(own, sampled=token_ids[rows, 0], ids=ids, mode=mode, temperature=temperature, k=k)
        columns = [values.sampled[:, None], values.tail[:, None], values.logprobs[:, :width]]
        if values.ids is not None:
            columns += [values.ids[:, width:].float(), values.logprobs[:, width:]]
        parts.append(_nan_if_not_finite(values, torch.cat(columns, dim=1)))
    return torch.cat(parts)


def top_k_rows(logprobs: Tensor, num_logprobs: int, token_ids: Tensor, *, temperature: float = 1.0) -> Any:
    """Log-probs of the teacher's best ``num_logprobs - 1`` ids and their tail from ``logprobs [n, V]``.

    Dividing log-probs by a temperature is dividing the logits, up to a constant. Replaces ``gather_logprobs`` of vLLM's
    V1 sampler. Returns ``LogprobsTensors`` of ``[n, 1 + num_logprobs]``.
    """
    from vllm.v1.outputs import LogprobsTensors

    k = num_logprobs - 1
    ids, rows = [], []
    for chunk in _chunks(logprobs):
        sampled = token_ids[chunk]
        mode: ScoreMode = "teacher_topk" if k else "sampled"
        own = logprobs[chunk].clone()
        values = score_logits(own, sampled=sampled, ids=None, mode=mode, temperature=temperature, k=k)
        picked = sampled.new_empty((sampled.shape[0], 0)) if values.ids is None else values.ids
        ids.append(torch.cat([sampled[:, None], picked, torch.zeros_like(sampled)[:, None]], dim=1))
        row = torch.cat([values.sampled[:, None], values.logprobs, values.tail[:, None]], dim=1)
        rows.append(_nan_if_not_finite(values, row))
    return LogprobsTensors(torch.cat(ids).to(torch.int32), torch.cat(rows), torch.zeros_like(token_ids))


def nan_until_written(empty_cpu: Any) -> Any:
    """Wrap `empty_cpu` to fill log-probs with NaN, because the V1 runner does not write rows of cached positions."""

    def empty_cpu_nan(num_positions: int, num_tokens_per_position: int) -> Any:
        tensors = empty_cpu(num_positions, num_tokens_per_position)
        tensors.logprobs.fill_(float("nan"))
        return tensors

    return empty_cpu_nan


def _nan_if_not_finite(values: PositionScores, row: Tensor) -> Tensor:
    return row.masked_fill_(~values.finite[:, None], float("nan"))


def _chunks(logits: Tensor) -> list[slice]:
    """Slices of rows with an f32 copy below `CHUNK_BYTES`, because vLLM reserves no memory for the copy."""
    step = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]
