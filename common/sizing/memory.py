"""Memory of each kind of process of a run, by part. Pure arithmetic; `docs/cluster.md` explains the terms.

Read against DeepSpeed 0.19.8 (`runtime/zero/stage_1_and_2.py`, `stage3.py`) and measured on CPU
(`tests/integration/common/test_sizing.py`). Below, P are trained parameters, R ranks, e bytes of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.config.gpus import logit_chunk_tokens
from common.config.model import Config, TeacherConfig
from common.config.training import LearnerConfig
from common.sizing.machine import GIB
from common.sizing.model_size import ModelSize

FLOAT32 = 4

BUCKET_ELEMENTS = 50_000_000
"""Elements of a ZeRO communication buffer: 200 MB in float32. DeepSpeed's default is ten times that, several times."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's default: ZeRO-3 updates this many elements at a time, with a float32 copy of their gradients."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default: ZeRO-3 keeps at most this many gathered elements of weights."""
REDUCE_ELEMENTS = 500_000_000
"""DeepSpeed's default: without ZeRO, several ranks average this many elements of gradients at a time, in a copy."""

CUDA_BYTES = 768 * 1024**2
"""CUDA's context and communication buffers of a process; a guess."""
LEAST_KEPT = 0.7
"""Activations of a layer, measured, over `layer_token_bytes`: the least of the tested families."""

OBJECT_STORE = "object store"

PROCESS_BYTES = {"rank": 600 * 1024**2, "engine": 1500 * 1024**2, "teacher": 900 * 1024**2, "driver": 800 * 1024**2}
"""Resident memory before a model is loaded: Python, torch, vLLM (two processes), Ray. Estimates on the safe side."""


@dataclass(frozen=True, slots=True)
class ProcessNeed:
    """Bytes of one process. `parts` lie on its GPU, or in host memory if it has none; `host` lies in host memory."""

    name: str
    count: int
    gpus: float
    """GPUs of one process."""
    parts: Mapping[str, int]
    """Held from the first step on, exact up to the libraries' rounding."""
    peak: Mapping[str, int] = field(default_factory=dict)
    """Held for parts of a step only; the largest counts. Estimates."""
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def certain(self) -> int:
        """Bytes that no setting of the step avoids."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """`certain` and the largest peak."""
        return self.certain + max(self.peak.values(), default=0)

    @property
    def host_certain(self) -> int:
        """`certain` in host memory. Rollouts in the object store can spill to disk."""
        return sum(size for name, size in self.host.items() if name != OBJECT_STORE) + (
            0 if self.gpus else self.certain
        )

    @property
    def host_total(self) -> int:
        """Bytes of host memory."""
        return sum(self.host.values()) + (0 if self.gpus else self.total)


def process_needs(
    config: Config,
    student: ModelSize,
    teachers: Mapping[str, ModelSize],
    *,
    context_tokens: int = 0,
    longest_prompt: int = 0,
) -> tuple[ProcessNeed, ...]:
    """Needs of each kind of process. `teachers` maps names of `Config.named_teachers` to models.

    `context_tokens` is the sum over all contexts, `longest_prompt` the student's longest prompt.
    """
    longest = longest_prompt + config.rollout.max_tokens
    samples = config.rollout.batch_size * config.rollout.samples_per_prompt
    # A step has no more tokens than its samples; without prompts their lengths are unknown.
    step_tokens = -(-samples // config.learner.ranks) * longest if longest_prompt else None
    found = [rank_need(config, student, longest, step_tokens), engine_need(config, student, longest)]
    for name, teacher in config.named_teachers().items():
        if name in teachers and teacher.url is None and teacher.kind != "base":
            found.append(teacher_need(name, teacher, teachers[name], config.sync.bucket_bytes, context_tokens))
    found.append(
        ProcessNeed("driver", 1, 0, {}, host={"process": PROCESS_BYTES["driver"], OBJECT_STORE: _store(config)})
    )
    return tuple(found)


# --- the learner ----------------------------------------------------------------------------------------------------


def zero_stage(learner: LearnerConfig, element_bytes: int) -> int:
    """Stage that runs: bfloat16 needs at least 2, where DeepSpeed keeps float32 sums of gradients."""
    return learner.zero_stage if element_bytes == FLOAT32 else max(learner.zero_stage, 2)


def rank_need(config: Config, model: ModelSize, longest: int, step_tokens: int | None = None) -> ProcessNeed:
    """A rank of the learner, whose step has at most `step_tokens` tokens.

    A sequence of `longest` tokens is a micro-batch by itself if it exceeds ``learner.micro_batch_tokens``.
    """
    learner = config.learner
    element = element_bytes(config.student.dtype, learner.gpus_per_rank)
    stage, ranks = zero_stage(learner, element), learner.ranks
    trained = model.trained(learner.lora)
    share = -(-trained // ranks)
    weights = element * (-(-model.parameters // ranks) if stage == 3 else model.parameters)
    state, host = _state(stage, ranks, trained, share, element, offload=learner.cpu_offload)
    tokens = max(min(learner.micro_batch_tokens, step_tokens or learner.micro_batch_tokens), longest)
    peak = {
        "a pass": sum(_pass(learner, model, tokens, element).values())
        + _reduction(stage, ranks, trained, model, element),
        "the update": FLOAT32 * min(SUB_GROUP_ELEMENTS, share) if stage == 3 else 0,
    }
    return ProcessNeed(
        "rank",
        ranks,
        learner.gpus_per_rank,
        {"weights": weights, **state},
        peak,
        {"process": PROCESS_BYTES["rank"], "sync": 3 * config.sync.bucket_bytes, **host},
    )


def _state(
    stage: int, ranks: int, trained: int, share: int, element: int, *, offload: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Gradients and optimiser of one rank: on its device, and in host memory with `learner.cpu_offload`."""
    moments = 2 * FLOAT32
    if stage == 0:
        return {"gradients": FLOAT32 * trained, "optimiser": moments * trained}, {}
    master = FLOAT32  # a copy of the partition, also of float32 weights
    gradients = FLOAT32 * (trained if stage == 1 else share)
    if not offload:
        return {"gradients": gradients, "optimiser": (master + moments) * share}, {}
    host = {"optimiser": (master + moments) * share, "gradients": FLOAT32 * share}
    if stage == 3:
        return {}, {**host, "gradients": 2 * FLOAT32 * share}
    return {"gradients": gradients}, {**host, "weights": element * share}


def _reduction(stage: int, ranks: int, trained: int, model: ModelSize, element: int) -> int:
    """Buffers of the gradients' reduction, and weights that ZeRO-3 gathers."""
    if stage == 0:
        return FLOAT32 * min(REDUCE_ELEMENTS, trained) if ranks > 1 else 0
    buckets = 2 if stage == 2 and ranks > 1 else 1  # with `overlap_comm` one fills while the other is reduced
    buffer = element * (buckets * min(BUCKET_ELEMENTS, trained) + min(model.largest, trained))
    if element < FLOAT32:  # a reduced bucket is converted before it is added; stage 3 converts the rank's share
        buffer += FLOAT32 * min(BUCKET_ELEMENTS, trained) // (ranks if stage == 3 else 1)
    elif stage < 3:  # float32 sums are not added in place: a second copy of the partition
        buffer += FLOAT32 * trained // ranks
    if stage < 3:
        return buffer
    # A bucket is copied for its reduce-scatter.
    return buffer + element * (min(BUCKET_ELEMENTS, trained) + min(LIVE_ELEMENTS, model.parameters))


def _pass(learner: LearnerConfig, model: ModelSize, tokens: int, element: int) -> dict[str, int]:
    """Activations of a micro-batch of `tokens`, logits of a chunk, the output layer's gradient."""
    casts = 0 if element == FLOAT32 else element
    logits = logit_chunk_tokens(learner) * model.vocabulary * (FLOAT32 + casts)
    head = 0 if learner.lora is not None else model.vocabulary * model.hidden * (FLOAT32 + casts)
    return {"activations": tokens * token_bytes(learner, model, element), "logits": logits, "output layer": head}


def token_bytes(learner: LearnerConfig, model: ModelSize, element: int) -> int:
    """Bytes of activations that a token of a micro-batch takes: for the backward pass, and one layer's gradients.

    With ``learner.gradient_checkpointing`` a layer keeps its input only, and one layer at a time is computed again.
    """
    layer, ends = layer_token_bytes(model, element), model.hidden * (2 * FLOAT32 + 2 * element)
    if learner.gradient_checkpointing:
        return model.layers * model.hidden * element + 2 * layer + ends
    return (model.layers + 1) * layer + ends


def layer_token_bytes(model: ModelSize, element: int) -> int:
    """Bytes that autograd keeps of a layer, per token, with fused attention.

    Measured on real layers (`tests/unit/common/sizing/test_memory.py`): exact for Qwen 3, up to a fifth too much for
    Llama, Mistral and Qwen 2, which have no norms of heads; Gemma 2, with twice as many norms, keeps up to 1.5 times
    as much.
    """
    if element == FLOAT32:
        return 24 * model.hidden + 16 * (model.query + model.inner + model.key_value)
    return 16 * model.hidden + 10 * (model.query + model.key_value) + 8 * model.inner


def longest_trainable(config: Config, model: ModelSize, memory_bytes: int) -> int:
    """Longest sequence, prompt included, whose micro-batch fits a rank with `memory_bytes`; 0 if no token does."""
    learner, element = config.learner, element_bytes(config.student.dtype, config.learner.gpus_per_rank)
    need = rank_need(config, model, 0)
    room = memory_bytes - need.certain
    if room < need.peak["the update"]:
        return 0
    stage, trained = zero_stage(learner, element), model.trained(learner.lora)
    fixed = sum(_pass(learner, model, 0, element).values()) + _reduction(stage, learner.ranks, trained, model, element)
    return max(0, (room - fixed) // token_bytes(learner, model, element))


@dataclass(frozen=True, slots=True)
class LengthFault:
    """A sequence too long for a rank's memory; `certain` also for the models that keep least (`LEAST_KEPT`)."""

    text: str
    certain: bool


def length_fault(config: Config, model: ModelSize, memory_bytes: int, longest: int) -> LengthFault | None:
    """Explain why a rank with `memory_bytes` cannot train a sequence of `longest` tokens; None if it can."""
    trainable = longest_trainable(config, model, memory_bytes)
    if longest <= trainable:
        return None
    text = (
        f"a rank with {memory_bytes / GIB:.1f} GiB can train sequences of about {trainable:,} tokens; the longest "
        f"prompt plus rollout.max_tokens has {longest:,}: more learner.ranks with learner.zero_stage 3, "
        "learner.gradient_checkpointing, learner.cpu_offload, or shorter answers"
    )
    return LengthFault(text, longest * LEAST_KEPT > trainable)


# --- engines and teachers -------------------------------------------------------------------------------------------


def engine_need(config: Config, model: ModelSize, longest: int) -> ProcessNeed:
    """A rollout worker: on a GPU the least that vLLM starts with, on CPU all weights and the whole key-value cache."""
    rollout = config.rollout
    element = element_bytes(config.student.dtype, rollout.gpus_per_worker)
    shares = rollout.tensor_parallel_size
    weights = element * model.parameters // shares
    if rollout.gpus_per_worker:
        tokens = config.student.max_sequence_tokens or min(model.max_tokens, max(longest, 1))
        cache = model.context_bytes(tokens, element) // shares
        name = "cache of one sequence"
    else:
        cache, name = rollout.kv_cache_gib * GIB, "key-value cache"
        # vLLM packs the weights for oneDNN, the output layer in addition to its plain weight.
        weights += element * model.vocabulary * model.hidden
    logits = 3 * FLOAT32 * rollout.max_num_seqs * model.vocabulary
    return ProcessNeed(
        "rollout worker",
        rollout.workers,
        rollout.gpus_per_worker * shares,
        {"weights": weights, name: cache},
        # A sync packs the new weights on CPU while the old ones are still there.
        {"logits": logits, "a sync": 0 if rollout.gpus_per_worker else weights},
        {"process": PROCESS_BYTES["engine"], "sync": 3 * config.sync.bucket_bytes},
    )


def teacher_need(
    name: str, teacher: TeacherConfig, model: ModelSize, bucket_bytes: int, context_tokens: int
) -> ProcessNeed:
    """A teacher that the run starts; of `context_tokens` at most ``teacher.context_cache_bytes`` are kept."""
    label = "teacher" if name == "default" else f"teacher {name}"
    if teacher.backend == "remote":  # the endpoint holds the model
        return ProcessNeed(label, 1, 0, {}, host={"process": PROCESS_BYTES["teacher"]})
    element = element_bytes(teacher.dtype, teacher.gpus)
    weights = element * model.parameters
    needed = model.context_bytes(context_tokens, element)
    contexts = min(teacher.context_cache_bytes, needed)
    batch = teacher.batch_tokens * (model.context_bytes(1, element) + layer_token_bytes(model, element))
    host = {"process": PROCESS_BYTES["teacher"]}
    if teacher.kind != "frozen":
        host["sync"] = 3 * bucket_bytes
    if teacher.context_host_bytes:
        host["contexts"] = min(teacher.context_host_bytes, needed - contexts)
    return ProcessNeed(
        label,
        1,
        teacher.gpus,
        {"weights": weights, "contexts": contexts},
        {"a batch": batch},
        host,
    )


def element_bytes(dtype: str, gpus: float) -> int:
    """Bytes of a weight; `auto` is bfloat16 on a GPU and float32 on CPU."""
    return 2 if dtype == "bfloat16" or (dtype == "auto" and gpus) else FLOAT32


def _store(config: Config) -> int:
    """Upper bound for a step's rollouts in Ray's object store: ids, the teacher's f16 log-probs, three f32 columns."""
    rollout = config.rollout
    samples = rollout.batch_size * rollout.samples_per_prompt * (1 + rollout.oversample_fraction)
    token = config.loss.top_k * (4 + 2) + 4 + 3 * FLOAT32
    return int(samples * rollout.max_tokens * token * (1 + rollout.max_staleness))
