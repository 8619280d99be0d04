"""Sections that say what a run starts from: its name, the models, the context, the rows; and how it is judged."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config.base import ConfigError, Dtype, Fraction, NonNegative, Positive, PositiveFloat, Section


class RunConfig(Section):
    """Identity of the run and where it leaves its files (``dir/name/``)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    dir: Path = Path("runs")
    seed: NonNegative = 0
    placement_timeout_s: Annotated[float, Field(ge=0)] = 0
    """How long a run waits for its GPUs to be there, as with an autoscaler. 0: it is refused at once where the cluster
    has no room. One that goes on from a checkpoint waits for 10 minutes at least."""
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
    kind: Literal["frozen", "live", "ema", "base"] = "frozen"
    """`frozen` keeps its weights. `live` and `ema` belong to one run and start from the student: they take every
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
    server_keys_file: Path | None = None
    """Of a server: who may ask, one ``TENANT SHA256`` a line (``opcd key`` makes them)."""
    allow_anonymous: bool = False
    """Of a server on a loopback address: serve anybody, as one tenant."""
    tls_certificate: Path | None = None
    """Of a server: PEM chain; with `tls_key` it speaks HTTPS."""
    tls_key: Path | None = None
    client_key_file: Path | None = None
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
        if self.kind in ("live", "ema") and self.backend != "transformers":
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
