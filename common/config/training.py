"""Sections of the loop: how answers are made, what is minimised, how weights travel, what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from common.config.base import Fraction, NonNegative, Positive, PositiveFloat, Section


class RolloutConfig(Section):
    """How the student answers, and the vLLM engines that make it."""

    source: Literal["student", "teacher"] = "student"
    """Whose answers are trained on. `teacher`: off-policy, as a baseline; `teacher.model` answers all prompts of the
    run once, with the context, before training, and the student learns from them without it."""
    answers_file: Path | None = None
    """Of `source: teacher`: where its answers are kept, default: ``offpolicy.jsonl`` of the run. What is there already,
    made by the same model, data, context, sampling and seed, is not made again: runs may share it."""
    batch_size: Positive = 128
    """Prompts of one optimiser step."""
    samples_per_prompt: Positive = 1
    max_tokens: Positive = 512
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The temperature inside the divergence is `loss.temperature`."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: tuple[str, ...] = ()
    """Strings that end an answer; the token that completes one is the answer's last."""
    topk_from: Literal["engine", "learner"] = "engine"
    """Whose k most likely ids are the student's support: those of the engine that samples, or those of the learner, one
    more forward pass over every answer (in bfloat16 the two differ a little: `topk_agreement`)."""
    workers: Positive = 1
    max_workers: Positive | None = None
    """Workers above `workers`, which the run begins with, join whenever the cluster has room for them: it asks for them
    (an autoscaler sees it), they take part from the next step on, and leave with their nodes. They hold their GPUs to
    the end of the run. Default: none."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    tensor_parallel_size: Positive = 1
    gpu_memory_utilization: Fraction = 0.9
    kv_cache_gib: Positive = 1
    """Key-value space of an engine on CPU."""
    threads: Positive | None = None
    """CPU threads of an engine, default: torch's choice."""
    max_num_seqs: Positive = 128
    enforce_eager: bool = True
    concurrency: Positive = 512
    """Answers in flight in one worker."""
    max_restarts: NonNegative = 8
    """Workers, not counting those beyond `workers`, that may be lost and replaced before the run stops."""
    colocated: bool = False
    """Worker i shares the GPU of rank i: engines sleep (weights in host memory, no key-value cache) while the learner
    trains. Less hardware, no overlap. On GPUs only."""
    max_staleness: NonNegative = 0
    """Optimiser steps that rollouts may run ahead: 0 trains each step on answers of the very weights it changes."""
    oversample_fraction: Annotated[float, Field(ge=0)] = 0.0
    """Share of prompts asked beyond a step's batch; the step takes the first answers and cuts the stragglers off, which
    favours short answers. They are counted (`staleness/discarded`)."""


class EnvironmentConfig(Section):
    """How rows with an `environment` are played."""

    max_turns: Positive = 5
    """Answers in one episode at most."""
    samples: Literal["observation", "chat", "conversation"] = "observation"
    """What is trained. `observation` (as in the paper): each answer, its prompt the observation alone, which must
    repeat what matters of the turns before. `chat`: each answer, its prompt the chat so far. `conversation`: the
    episode as one sequence, what the environment said in it masked out of the loss."""


class LossConfig(Section):
    """The per-token divergence and how it is averaged."""

    form: Literal["tail", "raw", "renorm", "generalized", "exact", "policy_gradient", "nll"] = "tail"
    """What becomes of the mass outside the support. `exact` has none: `loss.top_k` is the whole vocabulary. Two are
    baselines: `policy_gradient`, the sampled token's log-ratio as a reward, with an importance ratio; `nll`, the
    negative log-likelihood of the teacher's answers (`rollout.source: teacher`)."""
    direction: Literal["reverse", "forward", "jsd"] = "reverse"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of `jsd`."""
    support: Literal["student", "teacher", "union"] = "student"
    top_k: Positive = 256
    normalize: Literal["token", "sequence"] = "token"
    temperature: PositiveFloat = 1.0
    """Divides both sides' logits inside the divergence."""
    skip_first_tokens: NonNegative = 0
    clip_per_token: PositiveFloat | None = None
    ratio_clip: PositiveFloat | None = None
    """Largest importance ratio of `policy_gradient`."""
    importance_clip: PositiveFloat | None = None
    """Weight every token's divergence by how likely the answer up to it is under the current weights over how likely it
    was when it was sampled, cut at this value (truncated importance sampling): for `rollout.max_staleness` above 0, and
    for engines of another precision. Null: no weights. The ratio is a product over tokens, so watch
    `importance/ess_ratio`."""


class LoraConfig(Section):
    """Low-rank adapters: only they are trained, the base weights stay as they are."""

    rank: Positive = 16
    alpha: Positive = 32
    """The adapters' product is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get an adapter; `all-linear`: every linear layer but the output layer."""
    publish: Literal["merged", "adapter"] = "merged"
    """What a checkpoint holds: a whole model, or the adapter alone. Engines always get merged weights."""


class LearnerConfig(Section):
    """The optimiser and the ranks that run it."""

    steps: Positive = 50
    ranks: Positive = 1
    gpus_per_rank: Annotated[float, Field(ge=0)] = 0
    threads: Positive | None = None
    """CPU threads of a rank, default: torch's choice."""
    lr: PositiveFloat = 1e-6
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip: PositiveFloat = 1.0
    warmup_steps: NonNegative = 0
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch_tokens: Positive = 8192
    """Tokens of one micro-batch of one rank, padding included."""
    logit_chunk_tokens: Positive = 256
    """Response positions whose logits are alive at a time."""
    gradient_checkpointing: bool = False
    """Recompute activations layer by layer in the backward pass: less memory for about a third more time."""
    cpu_offload: bool = False
    """Optimiser state, and its update, in host memory (ZeRO 1 to 3)."""
    packing: Literal["auto", "off"] = "auto"
    """Lay answers end to end instead of padding them, where the model's attention can keep them apart."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    deterministic: bool = False
    """The same bits every time: deterministic algorithms, answers in a fixed order, one sequence at a time in the
    engines and in the run's own teacher. Slow: for tests and for debugging."""
    max_skipped_steps: NonNegative = 3
    """Steps in a row that a NaN or infinite gradient may cost before the run stops; as many may count no token, every
    answer being shorter than `loss.skip_first_tokens`."""
    collective_timeout_s: PositiveFloat = 1800.0
    """How long ranks wait for one another, among other things while one writes an export or a checkpoint; after that
    they are lost. Longer than `sync.timeout_s`: the others wait while rank 0 waits for an engine."""
    kl_alarm_ratio: PositiveFloat = 10.0
    """A step whose divergence is more than this many times the median of the 20 before it is reported."""


class CheckpointConfig(Section):
    """What a run keeps on disk to go on from (``opcd train CONFIG --resume``) and to serve."""

    every: NonNegative = 0
    """Steps between resumable checkpoints; 0: none."""
    keep: Positive = 2
    """Newest resumable checkpoints that stay."""
    max_restarts: NonNegative = 3
    """How often a run that lost a rank of the learner (or a node) goes on from its last checkpoint by itself."""
    export_every: NonNegative = 0
    """Steps between exports in Hugging Face format (all stay); 0: only the last step's, in ``checkpoint/``."""
    export_at: tuple[Positive, ...] = ()
    """Further steps after which to export."""


class SyncConfig(Section):
    """How new weights reach the engines, and the proof that they did."""

    backend: Literal["gloo", "nccl", "ipc", "file"] = "gloo"
    """`gloo`: through host memory, any device. `nccl`: between GPUs. `ipc`: learner and engines share a GPU or,
    without one, a host. `file`: safetensors in `folder`, for whatever else can read it."""
    folder: Path | None = None
    """Of `file`: a folder that learner and engines share, default: ``weights/`` of the run."""
    delta: bool = False
    """Over `gloo`: send only elements that changed since the version before (in bfloat16 most do not). Sender and
    receivers then hold a copy of the weights each, in host memory."""
    bucket_bytes: Positive = 64 * 1024 * 1024
    """Weights that travel together, or make one file: both ends hold two or three buckets in memory. A tensor that is
    larger makes one of its own."""
    timeout_s: PositiveFloat = 300.0
    """How long learner and engines wait for one another, to join and at every bucket, before the sync is broken."""
    probe_prompts: Positive = 8
    probe_tokens: Positive = 32
    """Response tokens of each probe sequence."""
    parity_nats: PositiveFloat | None = None
    """Largest engine-learner difference of a sampled token's log-prob, default: 2e-4 in float32, 0.1 in bfloat16."""
    parity_change_ratio: PositiveFloat = 0.1
    """Largest rms of (engine's change - learner's change) over the rms of the learner's change."""
    drift_warn_nats: PositiveFloat | None = None
    """On the tokens of a step, rms of engine minus learner log-prob from which on it is reported. Default: 0.002 in
    float32, 0.05 in bfloat16, none where rollouts run ahead (`rollout.max_staleness`)."""
    drift_stop_nats: PositiveFloat | None = None
    """The same, from which on the run stops. Default: ten times `drift_warn_nats`, none where rollouts run ahead."""
    drift_warn_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of tokens whose probability differs by more than a tenth, from which on it is reported. Default: 0.1, none
    where rollouts run ahead."""
    drift_stop_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same, from which on the run stops. Default: 0.5, none where rollouts run ahead."""
