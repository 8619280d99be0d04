"""The learner's arithmetic: DeepSpeed around the policy, gradient sums in, one step out. No Ray, no HTTP."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from common.config import Config
from common.schema import ScoredTrajectory, TokenSequence
from common.weights import TensorSpec
from learner.batching import (
    TrainingBatch,
    loss_tokens,
    pad_sequences,
    plan_micro_batches,
    sequence_of,
    training_batch,
)
from learner.export import WeightView
from learner.objective import METRICS, Objective
from learner.optimizer import deepspeed_config, effective_zero_stage, learning_rate, make_optimizer
from learner.policy import device_of, dtype_of, load_policy
from learner.reports import AccumulateReport, LearnerInfo, StepReport

_COUNTS = ("sequences", "response_tokens", "loss_tokens", "loss_sequences")


class LearnerEngine:
    """One rank. `accumulate`, `finish_step`, `named_weights` and `save` are collective: every rank calls them alike.

    Every `accumulate` adds gradient *sums*; `finish_step` divides by the step's global denominator (loss tokens, or
    sequences), clips, and steps. So the result depends neither on how the work was cut nor on who did it.
    """

    def __init__(self, config: Config) -> None:
        """Load the student and put DeepSpeed around it, on the ranks that `join_ranks` has brought together."""
        self._config = config
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        if config.learner.threads is not None:
            torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.run.seed)
        self._device = device_of(config)
        dtype = dtype_of(config, self._device)
        self._stage = effective_zero_stage(config.learner.zero_stage, dtype)
        policy = load_policy(config, self._device, dtype)
        self._vocab_size = int(policy.head.weight.shape[0])
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._parameters = sum(parameter.numel() for parameter in trained)
        self._deepspeed, *_ = deepspeed.initialize(
            model=policy,
            optimizer=make_optimizer(trained, config, self._stage),
            config=deepspeed_config(config, self._stage, dtype, self._world_size),
            dist_init_required=False,
        )
        if self._world_size == 1 and self._stage == 0:
            # It would copy all gradients into a buffer to average them over one rank.
            self._deepspeed.enable_backward_allreduce = False
        self._policy = self._deepspeed.module
        self._weights = WeightView(self._policy.model)
        self._dtype = dtype
        self._version = 0
        self._updates = 0
        self._skipped_in_a_row = 0
        self._begin_step()

    def _begin_step(self) -> None:
        self._passes = 0
        self._counts: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._nonfinite: list[str] = []

    @property
    def weight_version(self) -> int:
        """Number of finished steps."""
        return self._version

    def info(self) -> LearnerInfo:
        """What the controller and the engines need to know of this rank."""
        return LearnerInfo(
            rank=self._rank,
            world_size=self._world_size,
            device=str(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            zero_stage=self._stage,
            parameters=self._parameters,
            vocab_size=self._vocab_size,
            max_sequence_tokens=int(self._policy.model.config.get_text_config().max_position_embeddings),
            tensors=self._weights.specs,
            weight_version=self._version,
        )

    # --- the step ---------------------------------------------------------------------------------------------------

    def accumulate(self, batch: Sequence[ScoredTrajectory]) -> AccumulateReport:
        """Add the gradients of `batch` (any number of answers, none included), micro-batch by micro-batch.

        Raises ValueError, naming the sample, for arrays that do not fit its response; nothing was added then.
        """
        started = time.time()
        loss = self._config.loss
        lengths = [len(s.prompt_ids) + len(s.response_ids) for s in map(sequence_of, batch)]
        plan = plan_micro_batches(lengths, self._config.learner.micro_batch_tokens)
        batches = [training_batch([batch[index] for index in indices], loss) for indices in plan]
        sums: Counter[str] = Counter()
        nonfinite: list[str] = []
        missing = self._agreed_passes(len(batches)) - len(batches)
        for micro_batch in batches:
            objective = self._backward(micro_batch)
            sums.update(objective.metric_sums())
            nonfinite.extend(objective.nonfinite_samples())
        for _ in range(missing):
            self._backward(_nothing())
        responses = [len(item.trajectory.response_ids) for item in batch]
        counted = [loss_tokens(tokens, loss) for tokens in responses]
        self._counts.update(
            sequences=len(batch),
            response_tokens=sum(responses),
            loss_tokens=sum(counted),
            loss_sequences=sum(1 for tokens in counted if tokens),
        )
        self._sums.update(sums)
        self._nonfinite.extend(nonfinite)
        return AccumulateReport(
            sequences=len(batch),
            response_tokens=sum(responses),
            loss_tokens=sum(counted),
            padded_tokens=sum(b.sequences.padded_tokens for b in batches),
            micro_batches=len(batches),
            started=started,
            ended=time.time(),
            sums=dict(sums),
            nonfinite=tuple(nonfinite),
        )

    def _backward(self, batch: TrainingBatch) -> Objective:
        batch = batch.to(self._device)
        # DeepSpeed averages gradients over the ranks; the step wants their sum.
        objective = Objective(batch, self._config.loss, scale=float(self._world_size))
        self._deepspeed.backward(self._deepspeed(batch, objective))
        self._passes += 1
        return objective

    def _agreed_passes(self, own: int) -> int:
        """ZeRO 2 and 3 communicate in every pass, so all ranks make the same number; the others pass alone."""
        if self._world_size == 1 or self._stage < 2:
            return own
        most = torch.tensor(own, device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def finish_step(self, tokens: int, sequences: int) -> StepReport:
        """Divide by the global denominator, clip, update, count one version up.

        `tokens` and `sequences` are all response tokens and answers of the step, over all ranks. Raises ValueError
        where they differ from what the ranks were given: an answer was lost or trained on twice.
        """
        totals, sums = self._global_sums()
        if (tokens, sequences) != (totals["response_tokens"], totals["sequences"]):
            raise ValueError(
                f"the step has {tokens} tokens in {sequences} answers, the ranks were given "
                f"{totals['response_tokens']} in {totals['sequences']}"
            )
        lr = learning_rate(self._updates, self._config.learner.lr, self._config.learner.warmup_steps)
        by_token = self._config.loss.normalize == "token"
        applied = self._update(totals["loss_tokens" if by_token else "loss_sequences"], lr)
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self._updates += applied
        self._version += 1
        count = max(totals["loss_tokens"], 1)
        means = {name: sums[name] / count for name in METRICS}
        rms = means.pop("drift/squared") ** 0.5
        report = StepReport(
            weight_version=self._version,
            applied=applied,
            skipped_in_a_row=self._skipped_in_a_row,
            metrics={
                **means,
                "drift/rms": rms,
                "grad_norm": self._grad_norm(),
                "lr": lr,
                "skipped": float(not applied),
            },
            nonfinite=tuple(self._nonfinite),
        )
        self._begin_step()
        return report

    def _update(self, denominator: int, lr: float) -> bool:
        if denominator == 0:
            return False
        if self._passes == 0:  # a rank without any answer still takes part in the reduction
            self._backward(_nothing())
        optimizer = self._deepspeed.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.loss_scale = float(denominator)
        self._deepspeed.step()
        optimizer.loss_scale = 1.0  # it would multiply the next step's losses
        return bool(self._deepspeed.was_step_applied())

    def _grad_norm(self) -> float:
        """Norm of the whole gradient, divided but not clipped."""
        return float(self._deepspeed.get_global_grad_norm() or 0.0)

    def _global_sums(self) -> tuple[dict[str, int], dict[str, float]]:
        local = [float(self._counts[name]) for name in _COUNTS] + [float(self._sums[name]) for name in METRICS]
        values = torch.tensor(local, dtype=torch.float64, device=self._device)
        dist.all_reduce(values)
        everything = values.tolist()
        counts = {name: round(value) for name, value in zip(_COUNTS, everything, strict=False)}
        return counts, dict(zip(METRICS, everything[len(_COUNTS) :], strict=True))

    # --- reading ----------------------------------------------------------------------------------------------------

    def logprobs(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[NDArray[np.float32]]:
        """log-probs of the response tokens under the current weights, one ``[T]`` array per sequence.

        Every rank computes all of them (a collective under ZeRO-3).
        """
        results: list[Any] = [None] * len(sequences)
        lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
        for indices in plan_micro_batches(lengths, self._config.learner.micro_batch_tokens):
            batch = pad_sequences([sequences[index] for index in indices]).to(self._device)
            values = self._policy.response_logprobs(batch, temperature).cpu().numpy()
            parts = np.split(values, np.cumsum(batch.lengths)[:-1])
            for index, part in zip(indices, parts, strict=True):
                results[index] = part
        return results

    # --- the weights ------------------------------------------------------------------------------------------------

    def weight_specs(self) -> tuple[TensorSpec, ...]:
        """What `named_weights` gives, in its order."""
        return self._weights.specs

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor) of every parameter; tied output layers once. Copy what must outlive the next item.

        A collective under ZeRO-3: every rank goes through all of them.
        """
        return self._weights.gathered(self._config.sync.bucket_bytes)

    def save(self, folder: Path) -> None:
        """A Hugging Face folder with the tokenizer, complete or absent; rank 0 writes."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._config.student.model) if self._rank == 0 else None
        group_bytes = self._config.sync.bucket_bytes
        self._weights.save(folder, tokenizer, write=self._rank == 0, group_bytes=group_bytes)
        dist.barrier()


def _nothing() -> TrainingBatch:
    """One token of weight zero: a pass that takes part in the collectives and adds zero gradients."""
    from common.schema import as_ids

    ids = as_ids([0])
    return TrainingBatch(
        sequences=pad_sequences([TokenSequence(ids, ids)]),
        ids=torch.zeros(1, 1, dtype=torch.long),
        teacher_logprobs=torch.zeros(1, 1),
        teacher_tail=torch.zeros(1),
        teacher_sampled=torch.zeros(1),
        engine_sampled=torch.zeros(1),
        weights=torch.zeros(1),
        owners=torch.zeros(1, dtype=torch.long),
        sample_ids=("nothing",),
    )
