"""Sections of the training loop: rollouts, loss, learner, checkpoints, weight sync."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.base import Fraction, NonNegative, Positive, PositiveFloat, Section


class MixConfig(Section):
    """Responses of student and teacher in one run."""

    teacher: Fraction
    """Share of each step's prompts whose responses are the teacher's, sampled with the context before training."""
    student: Fraction | None = None
    """Share of the others. Default: the rest."""
    teacher_steps: NonNegative = 0
    """Steps at the start with the teacher's responses alone."""

    @model_validator(mode="after")
    def _shares_are_a_whole(self) -> MixConfig:
        if self.student is not None and abs(self.student + self.teacher - 1) > 1e-6:
            raise ValueError(f"student ({self.student:g}) and teacher ({self.teacher:g}) must add up to 1")
        return self


class RolloutConfig(Section):
    """Sampling of responses, and the vLLM engines that sample."""

    source: Literal["student", "teacher"] = "student"
    """Model whose responses the student trains on. `teacher` is an off-policy baseline: `teacher.model` answers all
    prompts of the run once, with the context, before training starts."""
    mix: MixConfig | None = None
    """Trains on responses of both, with the same loss: the teacher's show what the student never tries by itself."""
    answers_file: Path | None = None
    """File for the teacher's answers with `source: teacher` or `mix`. Default: ``offpolicy.jsonl`` in the run's folder.
    Answers already in the file are reused if model, data, context, sampling and seed are the same, so runs may share
    it."""
    batch_size: Positive = 128
    """Prompts per optimiser step."""
    samples_per_prompt: Positive = 1
    """Responses per prompt."""
    max_tokens: Positive = 512
    """Upper bound for tokens per response."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. `loss.temperature` is the one inside the divergence."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Top-p (nucleus) filter."""
    stop: tuple[str, ...] = ()
    """Stop strings. The token that completes one is the response's last token."""
    topk_from: Literal["engine", "learner"] = "engine"
    """Model that picks the student's k most likely ids: the sampling engine, or the learner in one more forward pass
    over every response. In bfloat16 the two differ slightly (`topk_agreement`)."""
    workers: Positive = 1
    """Rollout workers; each holds one engine."""
    max_workers: Positive | None = None
    """Upper bound for elastic workers. Workers above `workers` join at the next step whenever the cluster has room (an
    autoscaler sees the demand), and leave with their nodes. They keep their GPUs until the run ends. Default: no
    elastic workers."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """GPUs to reserve per worker. A process that reserves none sees none. Below 1 the worker shares a GPU with the
    learner's only rank, other workers or a teacher (docs/cluster.md)."""
    tensor_parallel_size: Positive = 1
    """GPUs that share one model."""
    gpu_memory_utilization: Fraction | None = None
    """Share of a GPU's memory that an engine may take. Default: 0.9, or 0.9 of `gpus_per_worker` if that is below
    1."""
    kv_cache_gib: Positive = 1
    """Size of an engine's key-value cache on CPU."""
    threads: Positive | None = None
    """CPU threads per engine. Default: torch's choice."""
    max_num_seqs: Positive = 128
    """Upper bound for sequences that an engine decodes at once."""
    enforce_eager: bool | None = None
    """Run vLLM without CUDA graphs. Default: false on GPUs, unless `learner.deterministic`; true on CPU."""
    concurrency: Positive = 512
    """Upper bound for requests in flight per worker."""
    max_restarts: NonNegative = 8
    """Upper bound for workers lost and replaced before the run stops. Elastic workers do not count."""
    max_staleness: NonNegative = 0
    """Upper bound for optimiser steps between sampling a response and training on it. 0 is strictly on-policy."""
    oversample_fraction: Annotated[float, Field(ge=0)] = 0.0
    """Extra prompts sampled per step, as a share of the batch. The step takes the first responses to finish and
    discards the rest, which favours short responses (`staleness/discarded`)."""

    @property
    def teacher_answers(self) -> bool:
        """True if the run trains on stored answers of the teacher."""
        return self.source == "teacher" or self.mix is not None


class EnvironmentConfig(Section):
    """Play of rows that have an `environment`."""

    max_turns: Positive = 5
    """Upper bound for turns per episode."""
    sample_format: Literal["observation", "chat", "conversation"] = "observation"
    """Form of the training samples. `observation` (as in the paper): one sample per turn whose prompt is the
    observation alone, so an observation must repeat what matters of earlier turns. `chat`: one sample per turn whose
    prompt is the chat so far. `conversation`: one sample per episode, with the environment's text masked out of the
    loss."""


class MixedLoss(Section):
    """Loss on the responses to one set of `data.mix`."""

    weight: PositiveFloat = 1.0
    """Factor of the loss, reward included."""
    form: Literal["tail", "raw", "renorm", "generalized"] | None = None
    """As `loss.form`, which is the default, as for the keys below."""
    direction: Literal["reverse", "forward", "jsd"] | None = None
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None


class LossConfig(Section):
    """The per-token divergence and its average."""

    form: Literal["tail", "raw", "renorm", "generalized", "exact", "policy_gradient", "nll"] = "tail"
    """Treatment of the probability mass outside the support. `tail` adds one bucket for it, `raw` drops it (the paper's
    form), `renorm` renormalises both sides, `generalized` drops it and corrects every term to be non-negative, `exact`
    has none: `loss.top_k` is the whole vocabulary. Two forms are baselines: `policy_gradient` takes the sampled token's
    log-ratio as a reward, with an importance ratio; `nll` is the negative log-likelihood of the teacher's answers
    (`rollout.source: teacher`)."""
    direction: Literal["reverse", "forward", "jsd"] = "reverse"
    """`reverse` is KL(student, teacher), `forward` is KL(teacher, student), `jsd` mixes both."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of `jsd`."""
    support: Literal["student", "teacher", "union"] = "student"
    """Model whose `top_k` most likely ids form the support; `union` takes both models' ids."""
    top_k: Positive = 256
    """Ids per response position and model."""
    normalize: Literal["token", "sequence"] = "token"
    """Average over all tokens of a step, or over tokens within a response and then over responses."""
    temperature: PositiveFloat = 1.0
    """Temperature inside the divergence: it divides the logits of student and teacher."""
    skip_first_tokens: NonNegative = 0
    """Response tokens at the start that the loss ignores."""
    clip_per_token: PositiveFloat | None = None
    """Upper bound for a token's divergence. Default: none."""
    clip_per_entry: PositiveFloat | None = None
    """Upper bound for the term of a single id in a token's divergence. Default: none."""
    reward_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a reward in addition to the divergence: the loss adds this multiple of a policy gradient, in which each
    response's advantage is its reward minus the mean reward of the prompt's other responses. An environment gives its
    own reward; other rows are graded against their answers. 0 is distillation alone."""
    reward: str | None = None
    """Grader that gives the reward: 1 for right, 0 for wrong, or the number that your own function returns
    (`package.module:attribute`). Default: `eval.grader`."""
    ratio_clip: PositiveFloat | None = None
    """Upper bound for the importance ratio of `policy_gradient` and of the reward's term. Default: none."""
    importance_clip: PositiveFloat | None = None
    """Turns on truncated importance sampling, for `rollout.max_staleness` above 0 and for engines of another precision.
    Each token's divergence is multiplied by the probability of the tokens before it under the current weights, divided
    by that under the sampling weights, capped at this value. The ratio is a product over tokens, so watch
    `importance/ess_ratio`. Default: off."""

    def of_mixed(self, mixed: MixedLoss) -> LossConfig:
        """Return the loss on a set of `data.mix`."""
        return self.model_copy(update=mixed.model_dump(exclude={"weight"}, exclude_none=True))


class LoraConfig(Section):
    """Low-rank adapters. Only the adapters are trained."""

    rank: Positive = 16
    alpha: Positive = 32
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the layers with an adapter. `all-linear` means every linear layer except the output layer."""
    publish: Literal["merged", "adapter"] = "merged"
    """Content of an export: the whole model, or the adapter alone. Engines always receive merged weights."""


class LearnerConfig(Section):
    """The optimiser and the learner's ranks."""

    steps: Positive = 50
    """Optimiser steps of the run."""
    ranks: Positive = 1
    """Data-parallel processes of the learner."""
    gpus_per_rank: Annotated[float, Field(ge=0)] = 0
    """GPUs to reserve per rank. With 0 the rank computes on CPU; below 1 it shares a GPU, and takes at most this share
    of its memory."""
    threads: Positive | None = None
    """CPU threads per rank. Default: with `cpu_offload` the rank's share of its node's cores, else torch's choice."""
    lr: PositiveFloat = 1e-6
    """Learning rate of AdamW, after the warm-up and before the decay."""
    lr_schedule: Literal["constant", "cosine", "linear", "warmup_stable_decay"] = "constant"
    """Course of the learning rate after the warm-up. `cosine` and `linear` fall to `min_lr` at the last step;
    `warmup_stable_decay` stays at `lr` and falls, as a cosine, over the last `decay_steps`."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of a schedule that falls."""
    decay_steps: Positive | None = None
    """Steps of the decay, `warmup_stable_decay` only. Default: a tenth of `steps`, at least 1."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip: PositiveFloat = 1.0
    """Upper bound for the norm of the gradient."""
    warmup_steps: NonNegative = 0
    """Steps of linear learning-rate warm-up."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    micro_batch_tokens: Positive = 8192
    """Upper bound for tokens per micro-batch and rank. Padding counts; packed rows have none (`packing`)."""
    logit_chunk_tokens: Positive | None = None
    """Response positions whose logits are in memory at once. Default: 1024 on GPUs, 256 on CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for about a third more time."""
    cpu_offload: bool = False
    """Keep and update the optimiser state in host memory (ZeRO 1 to 3)."""
    packing: Literal["auto", "off"] = "auto"
    """`auto` concatenates responses instead of padding them, if the model's attention can separate them; otherwise a
    warning says why it cannot."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    deterministic: bool = False
    """Make the run bit-reproducible: deterministic algorithms, responses in a fixed order, one sequence at a time in
    the engines and in the run's own teacher. Slow; for tests and debugging."""
    max_skipped_steps: NonNegative = 3
    """Upper bound for consecutive steps without an update before the run stops. A step is skipped for a NaN or infinite
    gradient, or if every response is shorter than `loss.skip_first_tokens`."""
    collective_timeout_s: PositiveFloat = 1800.0
    """Limit for ranks to wait for one another, for example while one writes a checkpoint; after it they count as lost.
    Must be longer than `sync.timeout_s`, because the other ranks wait while rank 0 waits for an engine."""
    kl_alarm_ratio: PositiveFloat = 10.0
    """Report a step whose divergence exceeds this multiple of the median of the 20 steps before."""


def decay_steps(learner: LearnerConfig) -> int:
    """Steps at the end of the run over which the learning rate falls; 0 for a constant one."""
    if learner.lr_schedule == "constant":
        return 0
    if learner.lr_schedule == "warmup_stable_decay":
        return learner.decay_steps or max(1, learner.steps // 10)
    return learner.steps - learner.warmup_steps


class CheckpointConfig(Section):
    """Checkpoints to resume from (``opcd train CONFIG --resume``) and exports to serve."""

    every: NonNegative | None = None
    """Steps between resumable checkpoints; 0 writes none. Default: by time, every 3 minutes, or less often if writing
    would take more than 2% of the run."""
    keep: Positive = 2
    """Number of resumable checkpoints to keep; older ones are deleted."""
    max_restarts: NonNegative = 3
    """Upper bound for automatic restarts from the last checkpoint after the loss of a rank or a node."""
    export_every: NonNegative = 0
    """Steps between exports in Hugging Face format; all are kept. 0 exports the last step only, to ``checkpoint/``."""
    export_at: tuple[Positive, ...] = ()
    """Additional steps to export."""
    copy_to: str | None = None
    """Folder that gets a copy of every checkpoint and export in its subfolder ``run.name``: ``s3://bucket/runs``,
    ``gs://…``, ``hf://…`` or any address that fsspec knows. Needs that store's package (``s3fs``, ``gcsfs``,
    ``huggingface_hub``)."""


class SyncConfig(Section):
    """Transfer of new weights to the engines, and the checks that they arrived."""

    backend: Literal["auto", "gloo", "nccl", "ipc", "file"] = "auto"
    """`gloo`: through host memory, any device. `nccl`: between GPUs, none of them shared. `ipc`: learner and engines
    share one GPU. `file`: safetensors in `folder`, which other programs can read as well. `auto`: `nccl` if ranks,
    workers and receiving teachers have whole GPUs, else `gloo`."""
    folder: Path | None = None
    """Shared folder for `file`. Default: ``weights/`` in the run's folder."""
    delta: bool = False
    """Send only the elements that changed since the last version (in bfloat16 most do not change). `gloo` only. Sender
    and receivers each keep a copy of the weights in host memory."""
    bucket_bytes: Positive = 64 * 1024 * 1024
    """Size of one transfer, or of one file. Both ends hold two or three buckets in memory. A larger tensor is a bucket
    by itself."""
    timeout_s: PositiveFloat = 300.0
    """Limit for learner and engines to wait for one another, to join and at every bucket, before the sync fails."""
    probe_prompts: Positive = 8
    """Sequences of the parity probe, which learner and engines score after every sync."""
    probe_tokens: Positive = 32
    """Response tokens per probe sequence."""
    parity_rms_nats: PositiveFloat | None = None
    """Upper bound for the rms of engine minus learner log-prob over the probe's tokens, the worst hundredth left out.
    Default: 5e-5 in float32, 0.15 in bfloat16."""
    parity_q99_nats: PositiveFloat | None = None
    """Upper bound for this difference in 99% of the probe's tokens. Default: 2e-4 in float32, 0.5 in bfloat16."""
    parity_change_ratio: PositiveFloat = 0.1
    """Upper bound for rms(engine's change - learner's change) / rms(learner's change) on the probe, since the version
    before and since version 0. Three times the rms difference at version 0 is always allowed."""
    expert_mismatch: bool = False
    """For a mixture of experts: measure after every sync, layer by layer, which share of the experts that the learner
    chooses for the probe's tokens an engine does not choose (`expert_mismatch/layer_N`). vLLM then records the experts
    of every token. Needs workers on GPUs and prefix caching: not with `learner.deterministic`."""
    mismatch_warn_nats: PositiveFloat | None = None
    """Report a step if engine minus learner log-prob has an rms above this over the trained tokens. Default: 0.002 in
    float32, 0.1 in bfloat16, no bound if `rollout.max_staleness` is above 0."""
    mismatch_stop_nats: PositiveFloat | None = None
    """Stop the run above this rms. Default: five times `mismatch_warn_nats`, no bound if `rollout.max_staleness` is
    above 0."""
    mismatch_warn_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Report a step if the probabilities of more than this share of its tokens differ by over a tenth. Default: 0.1 in
    float32, 0.2 in bfloat16, no bound if `rollout.max_staleness` is above 0."""
    mismatch_stop_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stop the run above this share. Default: 0.5, no bound if `rollout.max_staleness` is above 0."""
