"""The learner's arithmetic: DeepSpeed around the policy, gradient sums in, one step out. No Ray, no HTTP."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from common.config.model import Config
from common.protocol.schema import ScoredTrajectory
from common.weight_sync.manifest import TensorSpec
from learner.trainer.batch_layout import PADDED
from learner.trainer.batching import (
    TrainingBatch,
    empty_batch,
    longest_answer,
    loss_tokens,
    sequence_of,
    training_batch,
)
from learner.trainer.distributed import raise_on_all
from learner.trainer.export import WeightView, full_shape, replace_folder
from learner.trainer.inference import Reader
from learner.trainer.lora import save_adapter
from learner.trainer.objective import METRICS, Objective
from learner.trainer.optimizer import deepspeed_config, effective_zero_stage, learning_rate, make_optimizer
from learner.trainer.packing import pack
from learner.trainer.policy import device_of, dtype_of, load_policy
from learner.trainer.reports import AccumulateReport, LearnerInfo, StepReport
from learner.trainer.skipped_records import MOST_RECORDS, record
from learner.trainer.state import load_state, save_state
from learner.trainer.token_watch import TokenKeeper, TokenWatch
from learner.trainer.update_norm import squared_update

_COUNTS = ("sequences", "response_tokens", "loss_tokens", "loss_sequences")


class LearnerEngine:
    """One rank. `accumulate`, `finish_step`, `named_weights` and `save` are collective: every rank calls them alike.
    `reader` looks at the weights as they are.

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
        if config.learner.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
            torch.use_deterministic_algorithms(True)
        self._device = device_of(config)
        dtype = dtype_of(config, self._device)
        self._stage = effective_zero_stage(config.learner.zero_stage, dtype)
        settings = deepspeed_config(config, self._stage, dtype, self._world_size)
        policy = load_policy(config, self._device, dtype, partition=settings if self._stage == 3 else None)
        self._vocab_size = full_shape(policy.head.weight)[0]
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._parameters = sum(math.prod(full_shape(parameter)) for parameter in trained)
        self._deepspeed, *_ = deepspeed.initialize(
            model=policy,
            optimizer=make_optimizer(trained, config, self._stage),
            config=settings,
            dist_init_required=False,
        )
        if self._world_size == 1 and self._stage == 0:
            # It would copy all gradients into a buffer to average them over one rank.
            self._deepspeed.enable_backward_allreduce = False
        self._policy = self._deepspeed.module
        self._policy.head.adds_gradient = self._stage == 0
        self._policy.check()
        self._layout = PADDED if config.learner.packing == "off" else pack(self._policy.model)
        self.reader = Reader(self._policy, self._layout, config, self._device)
        self._weights = WeightView(self._policy.model)
        self._dtype = dtype
        self._version = 0
        self._updates = 0
        self._skipped_in_a_row = 0
        self._uncounted_in_a_row = 0
        self._tokens = TokenKeeper(config.run.token_samples)
        self._begin_step()

    def _begin_step(self) -> None:
        self._passes = 0
        self._longest_answer = 0
        self._counts: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._nonfinite: list[str] = []
        self._bad: list[ScoredTrajectory] = []
        self._held: list[ScoredTrajectory] = []

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

        With ``learner.deterministic`` the answers are held until the step's end and then taken in the order of their
        ids, so that the order of arrival cannot show in the last bit.
        Raises ValueError, naming the sample, for arrays that do not fit its response; nothing was added then.
        """
        started = time.time()
        loss = self._config.loss
        responses = [len(item.trajectory.response_ids) for item in batch]
        counted = [loss_tokens(item.trajectory, loss) for item in batch]
        longest = max((longest_answer(item.trajectory) for item in batch), default=0)
        batches: list[TrainingBatch] = []
        sums: dict[str, float] = {}
        nonfinite: tuple[str, ...] = ()
        if self._config.learner.deterministic:
            self._held.extend(batch)
        else:
            batches = self._micro_batches(batch)
            sums, nonfinite = self._backward_all(batches)
            self._keep_bad(batch, nonfinite)
            self._tokens.describe(batch)
        self._longest_answer = max(self._longest_answer, longest)
        self._counts.update(
            sequences=len(batch),
            response_tokens=sum(responses),
            loss_tokens=sum(counted),
            loss_sequences=sum(1 for tokens in counted if tokens),
        )
        return AccumulateReport(
            sequences=len(batch),
            response_tokens=sum(responses),
            loss_tokens=sum(counted),
            padded_tokens=sum(b.sequences.computed_tokens for b in batches),
            micro_batches=len(batches),
            started=started,
            ended=time.time(),
            sums=sums,
            nonfinite=nonfinite,
        )

    def _micro_batches(self, batch: Sequence[ScoredTrajectory]) -> list[TrainingBatch]:
        lengths = [len(s.prompt_ids) + len(s.response_ids) for s in map(sequence_of, batch)]
        plan = self._layout.plan(lengths, self._config.learner.micro_batch_tokens)
        return [training_batch([batch[i] for i in indices], self._config.loss, self._layout) for indices in plan]

    def _backward_all(self, batches: Sequence[TrainingBatch]) -> tuple[dict[str, float], tuple[str, ...]]:
        """Gradients of all of them, and of as many empty ones as it takes to keep up with the other ranks."""
        missing = self._agreed_passes(len(batches)) - len(batches)
        sums: Counter[str] = Counter()
        nonfinite: list[str] = []
        for batch in (one.to(self._device) for one in batches):
            watch = self._tokens.watch(batch)
            objective = self._backward(batch, watch)
            if watch is not None:
                self._tokens.keep(watch)
            sums.update(objective.metric_sums())
            nonfinite.extend(objective.nonfinite_samples())
        for _ in range(missing):
            self._backward(empty_batch(self._layout))
        self._sums.update(sums)
        self._nonfinite.extend(nonfinite)
        return dict(sums), tuple(nonfinite)

    def _backward(self, batch: TrainingBatch, watch: TokenWatch | None = None) -> Objective:
        batch = batch.to(self._device)
        # DeepSpeed averages gradients over the ranks; the step wants their sum.
        objective = Objective(batch, self._config.loss, scale=float(self._world_size), watch=watch)
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
        if self._config.learner.deterministic:
            held = sorted(self._held, key=lambda item: item.trajectory.sample_id)
            _, nonfinite = self._backward_all(self._micro_batches(held))
            self._keep_bad(held, nonfinite)
            self._tokens.describe(held)
        totals, sums = self._global_sums()
        if (tokens, sequences) != (totals["response_tokens"], totals["sequences"]):
            raise ValueError(
                f"the step has {tokens} tokens in {sequences} answers, the ranks were given "
                f"{totals['response_tokens']} in {totals['sequences']}"
            )
        lr = learning_rate(self._updates, self._config.learner.lr, self._config.learner.warmup_steps)
        by_token = self._config.loss.normalize == "token"
        applied = self._update(totals["loss_tokens" if by_token else "loss_sequences"], lr)
        uncounted = "" if totals["loss_tokens"] else self._why_uncounted(sequences)
        self._uncounted_in_a_row = self._uncounted_in_a_row + 1 if uncounted else 0
        if not uncounted:
            self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self._updates += applied
        self._version += 1
        count = max(totals["loss_tokens"], 1)
        means = {name: sums[name] / count for name in METRICS}
        means["mismatch/rms"] = means.pop("mismatch/squared") ** 0.5
        squared = means.pop("importance/squared")
        means["importance/ess_ratio"] = means["importance/mean"] ** 2 / squared if squared else 0.0
        for name in self._unknown_metrics():
            del means[name]
        report = StepReport(
            weight_version=self._version,
            applied=applied,
            skipped_in_a_row=self._skipped_in_a_row,
            metrics={
                **means,
                "grad_norm": 0.0 if uncounted else self._grad_norm(),  # it would be that of the step before
                "update_norm": self._update_norm() if applied else 0.0,
                "lr": lr,
                "skipped": float(not applied),
            },
            nonfinite=tuple(self._nonfinite),
            records=tuple(record(item) for item in self._bad),
            tokens=self._tokens.records(self._config.loss),
            uncounted=uncounted,
            uncounted_in_a_row=self._uncounted_in_a_row,
        )
        self._begin_step()
        return report

    def _update(self, denominator: int, lr: float) -> bool:
        if denominator == 0:
            return False
        if self._passes == 0:  # a rank without any answer still takes part in the reduction
            self._backward(empty_batch(self._layout))
        optimizer = self._deepspeed.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.loss_scale = float(denominator)
        self._deepspeed.step()
        optimizer.loss_scale = 1.0  # it would multiply the next step's losses
        return bool(self._deepspeed.was_step_applied())

    def _why_uncounted(self, sequences: int) -> str:
        """Of a step without a loss token. A collective."""
        longest = torch.tensor(self._longest_answer, device=self._device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        if not int(longest):
            return f"no token was counted: the step has {sequences} answers, none with a token"
        return (
            f"no token was counted: loss.skip_first_tokens is {self._config.loss.skip_first_tokens}, the longest "
            f"answer has {int(longest)}"
        )

    def _unknown_metrics(self) -> Iterator[str]:
        """What this configuration cannot tell."""
        sampler = self._config.rollout
        foreign = sampler.source == "teacher"
        if self._config.loss.support == "student" or (foreign and sampler.topk_from == "engine"):
            yield "topk_overlap"
        # Under `teacher` only those of the student's ids are looked at that the teacher picked, too.
        if self._config.loss.support == "teacher" or (foreign and sampler.topk_from == "engine"):
            yield "support_coverage"
        if self._config.loss.importance_clip is None:
            yield from ("importance/mean", "importance/ess_ratio")
        if foreign or self._config.loss.temperature != sampler.temperature or sampler.top_p != 1:
            yield from ("mismatch/abs", "mismatch/rms", "mismatch/outside")

    def _keep_bad(self, batch: Sequence[ScoredTrajectory], nonfinite: Sequence[str]) -> None:
        self._bad += [item for item in batch if item.trajectory.sample_id in nonfinite]
        del self._bad[MOST_RECORDS:]

    def _update_norm(self) -> float:
        """Norm of the change that the step made to the weights."""
        zero = self._deepspeed.optimizer
        adam = getattr(zero, "optimizer", zero)
        # Stage 3 lends its parts to the optimiser one by one, and takes them away again.
        parts = zero.fp32_partitioned_groups_flat if self._stage == 3 else adam.param_groups[0]["params"]
        square = torch.tensor(squared_update(adam, parts), dtype=torch.float64)
        if self._stage > 0:  # each rank holds a part of the state
            square = square.to(self._device)
            dist.all_reduce(square)
        return float(square) ** 0.5

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
        """A Hugging Face folder with the tokenizer, or an adapter alone (``learner.lora.publish``); complete or absent.
        Rank 0 writes; raises OSError, on every rank, where the disk did not take it.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._config.student.model) if self._rank == 0 else None
        lora, model = self._config.learner.lora, self._config.student.model
        failed: Exception | None = None
        try:
            if lora is not None and lora.publish == "adapter":
                factors = self._weights.adapter_factors()
                if self._rank == 0:
                    replace_folder(folder, lambda partial: save_adapter(partial, factors, lora, model))
            else:
                group_bytes = self._config.sync.bucket_bytes
                self._weights.save(folder, tokenizer, write=self._rank == 0, group_bytes=group_bytes)
        except (OSError, SafetensorError) as error:
            failed = error
        raise_on_all(failed, f"{folder} was not written")

    def save_state(self, folder: Path) -> None:
        """Everything a bit-equal continuation needs: DeepSpeed's state, counters, random number generators.

        Call it between steps (raises RuntimeError within one). Every rank writes its part; whoever keeps checkpoints
        makes the folder count only when all have returned. Raises OSError, on every rank, where the disk did not take
        the part of one; the next step is as if nothing had been.
        """
        if self._passes or self._held or self._counts["sequences"]:
            raise RuntimeError("save_state was called in the middle of a step: its gradients would be lost")
        save_state(
            self._deepspeed,
            folder,
            {
                "version": self._version,
                "updates": self._updates,
                "skipped": self._skipped_in_a_row,
                "uncounted": self._uncounted_in_a_row,
            },
        )

    def load_state(self, folder: Path) -> None:
        """Continue from `save_state`, under the same world size and ZeRO stage. Raises ValueError where they differ."""
        counters = load_state(self._deepspeed, folder)
        self._version, self._updates = counters["version"], counters["updates"]
        self._skipped_in_a_row = counters["skipped"]
        self._uncounted_in_a_row = counters["uncounted"]
        self._begin_step()
