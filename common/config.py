"""The configuration of a run as typed, closed models; `common.config_file` reads them.

One section per process or concern. Every model rejects unknown keys; a mistake is one `ConfigError` line that names
the key, the value and the nearest valid one.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["auto", "float32", "bfloat16"]
"""`auto`: bfloat16 on a GPU, float32 on CPU."""


class ConfigError(ValueError):
    """One line that names the key, the value and what would be valid."""


class Section(BaseModel):
    """Base of every section: closed and immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RunConfig(Section):
    """Identity of the run and where it leaves its files (``dir/name/``)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    dir: Path = Path("runs")
    seed: NonNegative = 0
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Show each step's numbers to Prometheus there (0: any free port); None: not at all."""
    metrics_host: str = "127.0.0.1"
    """Address to listen on at `metrics_port`; `0.0.0.0` where Prometheus is on another machine."""
    wandb: str | None = None
    """Send them to this Weights & Biases project, ``project`` or ``team/project``; needs the package ``wandb``."""
    mlflow: str | None = None
    """Send them to this MLflow experiment; needs the package ``mlflow``."""
    mlflow_uri: str | None = None
    """Address of MLflow's tracking server or database, default: where MLflow looks by itself."""
    token_samples: NonNegative = 2
    """Answers of each step that are written to ``tokens.jsonl`` token by token (the first 512), for ``report.html``;
    the same ones whatever the number of ranks."""

    @property
    def path(self) -> Path:
        """``dir/name``: everything the run writes."""
        return self.dir / self.name


class StudentConfig(Section):
    """The model that learns. It never sees the context."""

    model: str
    """A folder in Hugging Face format, or a hub name."""
    dtype: Dtype = "auto"
    system: Literal["template", "none", "text"] = "template"
    """Chat rows: leave the system turn to the chat template, insist that there is none, or use `system_text`."""
    system_text: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template on both sides, for example ``{enable_thinking: false}``."""
    template_date: date = date(2026, 1, 1)
    """The day a chat template may print: fixed, so that a repeated or resumed run renders the same prompts."""
    max_sequence_tokens: Positive | None = None
    """Prompt + response, default: what the model supports."""

    @model_validator(mode="after")
    def _text_goes_with_system_text(self) -> StudentConfig:
        if (self.system == "text") != (self.system_text is not None):
            raise ValueError("student.system_text is set exactly when student.system is `text`")
        return self


class TeacherConfig(Section):
    """The model that scores the student's tokens under the context: launched by the run, or reached at `url`."""

    url: str | None = None
    """Address of a running teacher server; None: the run starts one of its own."""
    model: str | None = None
    """Default: the student's initial model. With a `url` it is needed only to generate in-context answers."""
    dtype: Dtype = "auto"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0: any free one."""
    kind: Literal["frozen", "self", "ema", "base"] = "frozen"
    """`frozen` keeps its weights. `self` and `ema` belong to one run and start from the student: they take every
    version that the learner publishes, or an exponential moving average of them. `base` is the student without its
    adapters (`learner.lora`), computed by the learner itself: no other copy of the weights, and no server."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of `ema`: average = decay * average + (1 - decay) * student, once a version."""
    backend: Literal["transformers", "vllm"] = "transformers"
    device_map: str | None = None
    """Of `transformers`: where the layers go (`auto` spreads a model over several GPUs), default: one device."""
    tensor_parallel_size: Positive = 1
    """Of `vllm`: GPUs that one model is cut over."""
    gpu_memory_utilization: Fraction = 0.9
    """Of `vllm` on GPUs: share of a GPU's memory that the engine may take, contexts included."""
    max_k: Positive = 1024
    max_sequence_tokens: Positive | None = None
    """Context + prompt + response, default: what the model supports."""
    max_items: Positive = 1024
    """Largest number of items in one request."""
    max_body_bytes: Positive = 256 * 1024 * 1024
    batch_tokens: Positive = 8192
    """Own (prompt + response) tokens of one forward pass."""
    batch_items: Positive | None = None
    """Items of one forward pass, default: as many as `batch_tokens` holds. 1: an item's scores do not depend, in the
    last bit, on what came with it."""
    batch_window_ms: Annotated[float, Field(ge=0)] = 5.0
    """How long the scheduler waits for more requests before a batch that is not full."""
    max_queued_tokens: Positive = 4 * 1024 * 1024
    context_cache_bytes: Positive = 4 * 1024**3
    """Bound on cached key-value state, least recently used contexts leave first. With `vllm` on CPU it is the engine's
    whole key-value cache; on GPUs the engine has what `gpu_memory_utilization` leaves it, and what it evicts by itself
    it computes again."""
    keys_file: Path | None = None
    """Of a server: who may ask, one ``TENANT SHA256`` a line (``opcd key`` makes them)."""
    allow_anonymous: bool = False
    """Of a server on a loopback address: serve anybody, as one tenant."""
    tls_certificate: Path | None = None
    """Of a server: PEM chain; with `tls_key` it speaks HTTPS."""
    tls_key: Path | None = None
    key_file: Path | None = None
    """Of a run with a `url`: the file that holds its key, nothing else."""
    ca_file: Path | None = None
    """Of a run with an ``https`` `url`: PEM bundle to trust instead of the system's."""
    threads: Positive | None = None
    """CPU threads of the forward pass, default: torch's choice."""
    gpus: Annotated[float, Field(ge=0)] = 0
    request_timeout_s: PositiveFloat = 600.0
    """Deadline of the client for one request, retries included."""
    max_failed_fraction: Fraction = 0.0
    """Share of a step's samples that may stay unscored (they are counted and left out) before the run stops."""

    @model_validator(mode="after")
    def _weights_need_transformers(self) -> TeacherConfig:
        if self.kind in ("self", "ema") and self.backend != "transformers":
            raise ValueError(f"kind `{self.kind}` takes new weights, which backend `{self.backend}` does not")
        return self


class ContextConfig(Section):
    """What the teacher knows and the student does not."""

    text: str | None = None
    file: Path | None = None
    pool: Path | None = None
    """Many contexts, JSON lines of `id` and `text`: each sample is scored under one that is drawn for it, a function of
    the run's seed, step, row and sample."""
    placement: Literal["prefix", "system", "user_prefix"] | None = None
    """Ahead of a raw prompt, in the system turn, or ahead of the first user content. Default: `prefix` for raw rows,
    `system` for chat rows."""

    @model_validator(mode="after")
    def _one_source(self) -> ContextConfig:
        if sum(source is not None for source in (self.text, self.file, self.pool)) != 1:
            raise ValueError("exactly one of context.text, context.file and context.pool must be set")
        return self

    def inline(self) -> ContextConfig:
        """The same with its text in it, for processes that do not see the file. A pool's texts travel with the samples
        that need them.
        """
        if self.pool is not None:
            return self
        return ContextConfig(text=self.read(), placement=self.placement)

    def read(self) -> str:
        """The context's text, byte for byte as it stands in the file. Raises ConfigError also for a pool, which has
        none of its own.
        """
        if self.pool is not None:
            raise ConfigError(
                f"context.pool: {self.pool} holds many contexts; here context.text or context.file is needed"
            )
        if self.text is not None:
            return self.text
        assert self.file is not None
        try:
            return self.file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"context.file: cannot read {self.file}: {error}") from error


Column = Literal["id", "prompt", "messages", "answer", "teacher", "environment", "options", "seed"]


class DataConfig(Section):
    """Rows: `train` to learn on, `valid` to choose a checkpoint by, `eval` to report on. Each is a file (JSON lines, or
    `.parquet`), `hf:NAME:CONFIG/SPLIT` (`datasets`; NAME may be a folder, CONFIG be left out, SPLIT be a slice),
    `game:FrozenLake?rows=512&seed=0&size=3`, or `reasoning_gym:TASK?size=512&seed=0`."""

    train: Path
    valid: Path | None = None
    eval: Path | None = None
    columns: dict[Column, str] = {}
    """Column of a row -> what the data calls it, dots leading inside (``{answer: reward_model.ground_truth}``)."""
    user_template: str | None = None
    """Text of the one user turn that makes a row, `{column}` standing for what the data has there; for data without a
    column `prompt` or `messages`."""
    labels: tuple[str, ...] = ()
    """What answers that are numbers stand for, from 0."""


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
    workers: Positive = 1
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
    """Workers that may be lost and replaced before the run stops."""
    colocated: bool = False
    """Worker i shares the GPU of rank i: engines sleep (weights in host memory, no key-value cache) while the learner
    trains. Less hardware, no overlap. On GPUs only."""
    max_staleness: NonNegative = 0
    """Optimiser steps that rollouts may run ahead: 0 trains each step on answers of the very weights it changes."""
    over_issue: Annotated[float, Field(ge=0)] = 0.0
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
    """What becomes of the mass outside the support. Two are baselines: `policy_gradient`, the sampled token's log-ratio
    as a reward, with an importance ratio; `nll`, the negative log-likelihood of the teacher's answers
    (`rollout.source: teacher`)."""
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
    `importance/effective_share`."""


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
    """Steps in a row that a NaN or infinite gradient may cost before the run stops."""
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


class SyncConfig(Section):
    """How new weights reach the engines, and the proof that they did."""

    backend: Literal["gloo", "nccl", "ipc", "file"] = "gloo"
    """`gloo`: through host memory, any device. `nccl`: between GPUs. `ipc`: learner and engine share a GPU. `file`:
    safetensors in `folder`, for whatever else can read it."""
    folder: Path | None = None
    """Of `file`: a folder that learner and engines share, default: ``weights/`` of the run."""
    delta: bool = False
    """Over `gloo`: send only elements that changed since the version before (in bfloat16 most do not). Sender and
    receivers then hold a copy of the weights each, in host memory."""
    bucket_bytes: Positive = 64 * 1024 * 1024
    """Weights that travel together, or make one file: both ends hold two or three buckets in memory. A tensor that is
    larger makes one of its own."""
    timeout_s: PositiveFloat = 300.0
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


class EvalConfig(Section):
    """Answers on held-out rows, before, during and after: greedy, or several drawn for each row."""

    every: NonNegative = 0
    """Steps between evaluations on `data.valid` (and after the last step): the best one's weights are kept in
    ``best/``. 0: none, only `data.eval` before and after."""
    grader: str = "exact"
    """`exact`, `exact_casefold`, `contains`, `regex:PATTERN`, `answer_tag`, `math`, `reasoning_gym` or
    `package.module:attribute` of your own (docs/tasks.md)."""
    max_tokens: Positive | None = None
    """Default: `rollout.max_tokens`."""
    samples: Positive = 1
    """Answers to each row. What is reported is pass@1, the mean of a row's share of right ones."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of drawn answers: the mass of the most likely tokens that may be drawn."""
    top_k: NonNegative = 0
    """Of drawn answers: how many of the most likely tokens may be drawn, 0: all."""
    ood: dict[str, Path] = {}
    """Name -> rows of another task, graded like `data.eval`, without the context, before and after: what was
    forgotten."""
    perplexity: dict[str, Path] = {}
    """Name -> a text, which the learner predicts before and after (nats a token, no context): what was forgotten."""
    perplexity_chunk_tokens: Annotated[int, Field(ge=2)] = 512
    """The text is cut into pieces of at most so many tokens, each predicted by itself."""


class ExperienceConfig(Section):
    """Of `opcd experience`: contexts that a model writes for itself, before the run that distils them."""

    model: str | None = None
    """Who solves problems and writes down what it learned, default: the student's initial model. Its tokenizer must be
    the student's."""
    seeds: Positive = 10
    """Series of problems, each in an order of its own."""
    problems: Positive = 30
    """Of `data.train`, in each series. After each problem the series has a context: seeds x problems of them."""
    max_context_tokens: Positive = 8192
    """Of a context; above it whole items leave, oldest first."""
    max_tokens: Positive | None = None
    """Of an answer that lists items, default: `rollout.max_tokens`."""
    templates: Path | None = None
    """Folder with prompts of your own (`extract.txt`, `extract_game.txt`, `context.txt`), default: those that ship."""
    select: Literal["random", "validation"] = "random"
    """Which contexts are kept: drawn at random, or those of highest accuracy on `data.valid`."""
    keep: Positive | None = None
    """How many, default: all of `random`, the best one of `validation`."""
    candidates: Positive | None = None
    """Of `validation`: how many contexts are tried, drawn at random, default: all."""


class Config(Section):
    """Everything one run is made of."""

    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], TeacherConfig] = {}
    """More teachers by name, each with the keys of `teacher`: a row's ``teacher`` column says which one scores it."""
    context: ContextConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    loss: LossConfig = LossConfig()
    learner: LearnerConfig = LearnerConfig()
    sync: SyncConfig = SyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    experience: ExperienceConfig = ExperienceConfig()

    @property
    def sync_in_run(self) -> SyncConfig:
        """`sync` with its default folder filled in: ``weights/`` of the run."""
        folder = (self.sync.folder or self.run.path / "weights").absolute()
        return self.sync.model_copy(update={"folder": folder})

    @property
    def answers_path(self) -> Path:
        """Where the teacher's own answers are kept (`rollout.source: teacher`)."""
        return self.rollout.answers_file or self.run.path / "offpolicy.jsonl"

    @property
    def teacher_model(self) -> str:
        """Folder or hub name of the teacher: the student's own initial model unless another is named."""
        return self.teacher.model or self.student.model

    def named_teachers(self) -> dict[str, TeacherConfig]:
        """All teachers by name; `teacher` is ``default``."""
        return {"default": self.teacher, **self.teachers}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        from common.config_rules import fault  # which reads this module

        found = fault(self)
        if found is not None:
            raise ValueError(found)
        return self


class TeacherServerConfig(Section):
    """What ``opcd teacher`` reads: the `teacher` section of the same file, its model named."""

    teacher: TeacherConfig
