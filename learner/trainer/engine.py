"""The learner's training engine: DeepSpeed around the policy, gradient sums in, one optimiser step out. No Ray."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from common.config.model import Config
from common.devices import limit_memory, memory_bytes
from common.openmp import usable_cores
from common.protocol.schema import ScoredTrajectory
from common.protocol.scoring import DEFAULT_TEACHER
from common.weight_sync.manifest import TensorSpec
from learner.trainer.batch_layout import PACKED, PADDED
from learner.trainer.distributed import raise_on_all, ranks_on_node
from learner.trainer.export import WeightView, full_shape
from learner.trainer.inference import PolicyInference
from learner.trainer.micro_batch import (
    MicroBatch,
    build_micro_batch,
    count_loss_tokens,
    empty_micro_batch,
    longest_turn,
    student_sequence,
)
from learner.trainer.objective import Objective
from learner.trainer.optimizer import deepspeed_config, effective_zero_stage, learning_rate, make_optimizer
from learner.trainer.packing import pack
from learner.trainer.policy import device_of, dtype_of, load_policy
from learner.trainer.reports import AccumulateReport, LearnerInfo, StepReport
from learner.trainer.skipped_records import MAX_RECORDS, skipped_record
from learner.trainer.source_files import check_reading, exported_files, read_source_files
from learner.trainer.state import load_state, save_state
from learner.trainer.step_metrics import METRICS, step_means
from learner.trainer.token_watch import TokenRecorder, TokenWatch
from learner.trainer.update_norm import update_norm

_COUNTS = ("sequences", "response_tokens", "loss_tokens", "loss_sequences", "following", "teacher_age")
"""Sums over a step's sequences. ``following``: scored by a teacher that takes weights; ``teacher_age``: the steps by
which its weights were older than the learner's, summed over these."""


class LearnerEngine:
    """One rank. All ranks call `accumulate`, `finish_step`, `named_weights` and `save` alike: they are collective.

    `accumulate` adds gradient *sums*; `finish_step` divides by the step's global denominator (loss tokens, or
    sequences), clips, and updates. So the result depends neither on the split into calls nor on the number of ranks.
    `inference` runs the current weights without gradients.
    """

    def __init__(self, config: Config) -> None:
        """Load the student and wrap it in DeepSpeed; `join_ranks` must have formed the process group."""
        learner = config.learner
        self._config = config
        self._mixed_losses = config.mixed_losses()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        if learner.threads is not None:
            torch.set_num_threads(learner.threads)
        elif learner.cpu_offload:  # Ray gives an actor without CPUs one thread, and AdamW now runs on the CPU
            torch.set_num_threads(max(1, usable_cores() // ranks_on_node()))
        torch.manual_seed(config.run.seed)
        if learner.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
            torch.use_deterministic_algorithms(True)
        self._device = device_of(learner)
        limit_memory(learner.gpus_per_rank)
        self._dtype = dtype_of(config.student, self._device)
        self._stage = effective_zero_stage(learner.zero_stage, self._dtype)
        settings = deepspeed_config(learner, self._stage, self._dtype, self._world_size)
        partition = settings if self._stage == 3 else None
        policy = load_policy(config.student, learner, self._device, self._dtype, partition)
        self._vocab_size = full_shape(policy.head.weight)[0]
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._parameters = sum(math.prod(full_shape(parameter)) for parameter in trained)
        self._deepspeed, *_ = deepspeed.initialize(
            model=policy,
            optimizer=make_optimizer(trained, learner, self._stage),
            config=settings,
            dist_init_required=False,
        )
        if self._world_size == 1 and self._stage == 0:
            # Otherwise DeepSpeed copies all gradients into a buffer to average them over one rank.
            self._deepspeed.enable_backward_allreduce = False
        self._policy = self._deepspeed.module
        self._policy.head.adds_gradient = self._stage == 0
        self._policy.check()
        self._unpacked = "" if learner.packing == "off" else pack(self._policy.model)
        self._layout = PACKED if self._unpacked is None else PADDED
        self.inference = PolicyInference(
            self._policy,
            self._layout,
            learner,
            config.loss.temperature,
            self._device,
            agreed_passes=lambda passes: self._agreed_passes(passes) if self._stage == 3 else passes,
        )
        self._weights = WeightView(self._policy.model)
        self._source_files = read_source_files(config.student.model) if self._rank == 0 else {}
        self._untrained = self._weights.untrained(config.student.model) if self._rank == 0 else {}
        self._version = 0
        self._updates = 0
        self._skipped_in_a_row = 0
        self._uncounted_in_a_row = 0
        self._following = {name for name, one in config.named_teachers().items() if one.kind in ("live", "ema")}
        self._token_recorder = TokenRecorder(config.run.token_samples)
        self._begin_step()

    def _begin_step(self) -> None:
        self._passes = 0
        self._longest_turn = 0
        self._counts: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._nonfinite: list[str] = []
        self._nonfinite_scored: list[ScoredTrajectory] = []
        self._held: list[ScoredTrajectory] = []

    @property
    def weight_version(self) -> int:
        """Number of finished steps."""
        return self._version

    def info(self) -> LearnerInfo:
        """Describe this rank to the driver and the engines."""
        return LearnerInfo(
            rank=self._rank,
            world_size=self._world_size,
            device=str(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            zero_stage=self._stage,
            parameters=self._parameters,
            vocab_size=self._vocab_size,
            tensors=self._weights.specs,
            weight_version=self._version,
            memory_bytes=memory_bytes(self._config.learner.gpus_per_rank),
            packed=self._layout is PACKED,
            unpacked=self._unpacked or "",
        )

    # --- the step ---------------------------------------------------------------------------------------------------

    def accumulate(self, batch: Sequence[ScoredTrajectory]) -> AccumulateReport:
        """Add the gradients of `batch` (possibly empty), micro-batch by micro-batch.

        With ``learner.deterministic`` the trajectories are held until the end of the step and processed in the order of
        their ids, so that the order of arrival cannot change the last bit.
        Raises ValueError, naming the sample, for arrays that do not fit its response; nothing is added then.
        """
        started = time.time()
        counted = [count_loss_tokens(item.trajectory, self._config.loss) for item in batch]
        longest = max((longest_turn(item.trajectory) for item in batch), default=0)
        ages = [
            self._version - item.teacher_version
            for item in batch
            if (item.trajectory.prompt.teacher or DEFAULT_TEACHER) in self._following
        ]
        micro_batches: list[MicroBatch] = []
        if self._config.learner.deterministic:
            self._held.extend(batch)
        else:
            micro_batches = self._micro_batches(batch)
            self._backward_all(micro_batches, batch)
        self._longest_turn = max(self._longest_turn, longest)
        self._counts.update(
            sequences=len(batch),
            response_tokens=sum(len(item.trajectory.response_ids) for item in batch),
            loss_tokens=sum(counted),
            loss_sequences=sum(1 for tokens in counted if tokens),
            following=len(ages),
            teacher_age=sum(ages),
        )
        return AccumulateReport(
            sequences=len(batch),
            padded_tokens=sum(one.sequences.computed_tokens for one in micro_batches),
            started=started,
            ended=time.time(),
            samples=tuple(dict.fromkeys(item.trajectory.sample_id for item in batch)),
        )

    def _micro_batches(self, batch: Sequence[ScoredTrajectory]) -> list[MicroBatch]:
        lengths = [len(s.prompt_ids) + len(s.response_ids) for s in map(student_sequence, batch)]
        plan = self._layout.plan(lengths, self._config.learner.micro_batch_tokens)
        return [build_micro_batch([batch[i] for i in indices], self._config.loss, self._layout) for indices in plan]

    def _backward_all(self, micro_batches: Sequence[MicroBatch], scored: Sequence[ScoredTrajectory]) -> None:
        """Add the gradients, metric sums and records of all `micro_batches` of `scored`.

        Empty passes follow until this rank has made as many passes as the others.
        """
        missing = self._agreed_passes(len(micro_batches)) - len(micro_batches)
        sums: Counter[str] = Counter()
        nonfinite: list[str] = []
        for batch in (one.to(self._device) for one in micro_batches):
            watch = self._token_recorder.watch(batch)
            objective = self._backward(batch, watch)
            if watch is not None:
                self._token_recorder.keep(watch)
            sums.update(objective.metric_sums())
            nonfinite.extend(objective.nonfinite_samples())
        for _ in range(missing):
            self._backward(empty_micro_batch(self._layout))
        self._sums.update(sums)
        self._nonfinite.extend(nonfinite)
        self._nonfinite_scored += [item for item in scored if item.trajectory.sample_id in nonfinite]
        del self._nonfinite_scored[MAX_RECORDS:]
        self._token_recorder.add_trajectories(scored)

    def _backward(self, batch: MicroBatch, watch: TokenWatch | None = None) -> Objective:
        batch = batch.to(self._device)
        # DeepSpeed averages gradients over the ranks; the step needs their sum.
        objective = Objective(batch, self._config.loss, self._mixed_losses, scale=float(self._world_size), watch=watch)
        self._deepspeed.backward(self._deepspeed(batch, objective))
        self._passes += 1
        return objective

    def _agreed_passes(self, passes: int) -> int:
        """Return the largest number of passes over all ranks under ZeRO 2 and 3, which communicate in every pass.

        Under ZeRO 2 only passes with gradients do.
        """
        if self._world_size == 1 or self._stage < 2:
            return passes
        max_passes = torch.tensor(passes, device=self._device)
        dist.all_reduce(max_passes, dist.ReduceOp.MAX)
        return int(max_passes)

    def finish_step(self, tokens: int, sequences: int) -> StepReport:
        """Divide by the global denominator, clip, update, and increment the version.

        `tokens` and `sequences` count the step's response tokens and samples over all ranks. Raises ValueError if they
        differ from the ranks' counts: a sample was lost or trained on twice.
        """
        if self._config.learner.deterministic:
            held = sorted(self._held, key=lambda item: item.trajectory.sample_id)
            self._backward_all(self._micro_batches(held), held)
        totals, sums = self._global_sums()
        if (tokens, sequences) != (totals["response_tokens"], totals["sequences"]):
            raise ValueError(
                f"the step has {tokens} tokens in {sequences} samples, but the ranks received "
                f"{totals['response_tokens']} in {totals['sequences']}: a sample was lost or trained on twice"
            )
        lr = learning_rate(self._updates, self._config.learner)
        by_token = self._config.loss.normalize == "token"
        applied = self._update(totals["loss_tokens" if by_token else "loss_sequences"], lr)
        uncounted = "" if totals["loss_tokens"] else self._why_uncounted(sequences)
        self._uncounted_in_a_row = self._uncounted_in_a_row + 1 if uncounted else 0
        if not uncounted:
            self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self._updates += applied
        self._version += 1
        # Without a counted token DeepSpeed still holds the norm of the step before.
        grad_norm = 0.0 if uncounted else float(self._deepspeed.get_global_grad_norm() or 0.0)
        report = StepReport(
            weight_version=self._version,
            applied=applied,
            skipped_in_a_row=self._skipped_in_a_row,
            metrics={
                **step_means(sums, totals["loss_tokens"], self._config.loss, self._config.rollout),
                **({"teacher/age": totals["teacher_age"] / totals["following"]} if totals["following"] else {}),
                "grad_norm": grad_norm,  # divided, not clipped
                "update_norm": update_norm(self._deepspeed, self._stage, self._device) if applied else 0.0,
                "lr": lr,
                "skipped": float(not applied),
            },
            nonfinite=tuple(self._nonfinite),
            skipped_records=tuple(skipped_record(item) for item in self._nonfinite_scored),
            token_records=self._token_recorder.records(self._config.loss),
            uncounted=uncounted,
            uncounted_in_a_row=self._uncounted_in_a_row,
        )
        self._begin_step()
        return report

    def _update(self, denominator: int, lr: float) -> bool:
        if denominator == 0:
            return False
        if self._passes == 0:  # a rank without samples still takes part in the reduction
            self._backward(empty_micro_batch(self._layout))
        optimizer = self._deepspeed.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.loss_scale = float(denominator)
        self._deepspeed.step()
        optimizer.loss_scale = 1.0  # DeepSpeed multiplies the next step's losses by it
        return bool(self._deepspeed.was_step_applied())

    def _why_uncounted(self, sequences: int) -> str:
        """Explain a step without a loss token. A collective."""
        longest = torch.tensor(self._longest_turn, device=self._device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        if not int(longest):
            return f"no token was counted: the step has {sequences} answers, none with a token"
        return (
            f"no token was counted: loss.skip_first_tokens is {self._config.loss.skip_first_tokens}, the longest "
            f"answer has {int(longest)}"
        )

    def _global_sums(self) -> tuple[dict[str, int], dict[str, float]]:
        local = [float(self._counts[name]) for name in _COUNTS] + [float(self._sums[name]) for name in METRICS]
        values = torch.tensor(local, dtype=torch.float64, device=self._device)
        dist.all_reduce(values)
        totals = values.tolist()
        counts = {name: round(value) for name, value in zip(_COUNTS, totals, strict=False)}
        return counts, dict(zip(METRICS, totals[len(_COUNTS) :], strict=True))

    # --- the weights ------------------------------------------------------------------------------------------------

    def weight_specs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of the tensors of `named_weights`, in its order."""
        return self._weights.specs

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (checkpoint name, tensor) of every parameter, tied output layers once.

        Copy a tensor to keep it past the next item. Under ZeRO-3 a collective that every rank must exhaust.
        """
        return self._weights.gathered(self._config.sync.bucket_bytes)

    def save(self, folder: Path, *, sample: bool = False) -> None:
        """Export a Hugging Face folder with the source's other files, or the adapter alone (``learner.lora.publish``).

        Rank 0 writes; the folder is complete or absent. `sample` writes one element of each tensor. Raises OSError on
        every rank if the write fails, for whatever reason: training and further saves can go on.
        """
        failure: Exception | None = None
        try:
            self._weights.export(
                folder,
                exported_files(self._source_files, self.info().dtype),
                self._config.learner.lora,
                self._config.student.model,
                self._untrained,
                write=self._rank == 0,
                group_bytes=self._config.sync.bucket_bytes,
                sample=sample,
            )
        except Exception as error:  # noqa: BLE001, whatever a library raises, the weights must outlive it
            failure = error
        raise_on_all(failure, f"{folder} was not written")

    def try_save(self, folder: Path) -> None:
        """Save once before the first step, to `folder`, which is removed: a fault shows now, not after the training.

        Raises OSError on every rank: for a failed save, an export that transformers reads otherwise than its source, or
        a disk without room for a whole export.
        """
        self.save(folder, sample=True)
        failure: Exception | None = None
        if self._rank == 0:
            try:
                check_reading(folder, self._config.student.model)
                needed = self._weights.export_bytes(self._config.learner.lora, self._untrained)
                free = shutil.disk_usage(folder).free
                if free < needed:
                    raise OSError(f"an export takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
            except Exception as error:  # noqa: BLE001, raised on all ranks below
                failure = error
            shutil.rmtree(folder, ignore_errors=True)
        raise_on_all(failure, f"an export to {folder.parent} would fail")

    def save_state(self, folder: Path, *, drop_step: bool = False) -> None:
        """Save DeepSpeed's state, counters and random number generators: enough for a bit-identical continuation.

        Every rank writes its part. The caller must treat `folder` as valid only when all ranks have returned. Raises
        RuntimeError within a step, and OSError on every rank if one rank cannot write; training can continue then.
        `drop_step` saves the state before a step that has begun, which cannot be finished then.
        """
        if not drop_step and (self._passes or self._held or self._counts["sequences"]):
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
        """Continue from `save_state`. Raises ValueError if the world size or the ZeRO stage differs."""
        counters = load_state(self._deepspeed, folder)
        self._version, self._updates = counters["version"], counters["updates"]
        self._skipped_in_a_row = counters["skipped"]
        self._uncounted_in_a_row = counters["uncounted"]
        self._begin_step()
