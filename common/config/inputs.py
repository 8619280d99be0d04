"""Sections that describe a run's inputs and evaluation: names, models, context, rows, graders."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from common.config.base import ConfigError, Dtype, Fraction, NonNegative, Positive, PositiveFloat, Section
from common.config.training import MixedLoss
from common.files import seen_from
from common.network import LOOPBACK


class RunConfig(Section):
    """The run's name, output folder (``dir/name/``) and monitoring."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    dir: Path = Path("runs")
    """Parent folder of the run's folder."""
    seed: NonNegative = 0
    """Seed of the row order and of all sampling."""
    placement_timeout_s: Annotated[float, Field(ge=0)] = 0
    """Seconds to wait until the cluster has room for the run, for example while an autoscaler adds nodes. 0 refuses the
    run at once if there is no room. A run that resumes from a checkpoint waits at least 10 minutes."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of the Prometheus endpoint with each step's metrics; 0 picks a free port, null disables the endpoint."""
    metrics_host: str = "127.0.0.1"
    """Address that `metrics_port` listens on. Use `0.0.0.0` if Prometheus runs on another machine."""
    wandb: str | None = None
    """Weights & Biases project that receives the metrics: ``project`` or ``team/project``. Needs the package
    ``wandb``."""
    mlflow: str | None = None
    """MLflow experiment that receives the metrics. Needs the package ``mlflow``."""
    mlflow_uri: str | None = None
    """Address of MLflow's tracking server or database. Default: MLflow's own setting."""
    token_samples: NonNegative = 2
    """Responses per step whose first 512 tokens go to ``tokens.jsonl`` one by one, for ``report.html``. The choice does
    not depend on the number of ranks. After step 100 fewer and fewer steps write theirs (docs/watching.md)."""

    @property
    def path(self) -> Path:
        """Folder of everything the run writes: ``dir/name``."""
        return self.dir / self.name


class StudentConfig(Section):
    """The model that learns. It never sees the context."""

    model: str
    """Folder in Hugging Face format, or hub name."""
    dtype: Dtype = "auto"
    """`auto` is bfloat16 on a GPU and float32 on CPU."""
    system: Literal["template", "none", "text"] = "template"
    """System turn of chat rows: `template` leaves it to the chat template, `none` refuses templates that insert one,
    `text` uses `system_text`."""
    system_text: str | None = None
    """System turn for `system: text`."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, for example ``{enable_thinking: false}``. For the teacher too, unless
    `context.chat_template_kwargs` is set."""
    template_date: date | Literal["template"] = date(2026, 1, 1)
    """The date that a chat template may print. It is fixed so that a repeated or resumed run renders the same prompts.
    `template` leaves it to the template, which may print a date of its own, or today's."""
    max_sequence_tokens: Positive | None = None
    """Upper bound for prompt plus response. Default: the model's own limit."""

    @model_validator(mode="after")
    def _text_goes_with_system_text(self) -> StudentConfig:
        if (self.system == "text") != (self.system_text is not None):
            raise ValueError("student.system_text must be set if and only if student.system is `text`")
        return self


class TeacherConfig(Section):
    """The model that scores the student's tokens with the context. The run starts it, or reaches it at `url`."""

    url: str | None = None
    """Address of a running teacher server. Default: the run starts its own teacher."""
    model: str | None = None
    """Folder or hub name. Default: the student's initial model. With a `url`, `model` is needed only to generate
    in-context answers."""
    dtype: Dtype = "auto"
    """`auto` is bfloat16 on a GPU and float32 on CPU. With `remote` it says what `endpoint` computes in, and `auto` is
    bfloat16."""
    host: str | None = None
    """Address that the server listens on. Default: 127.0.0.1; for a teacher that a run starts on a cluster, the address
    of its node."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the server; 0 picks a free one."""
    kind: Literal["frozen", "live", "ema", "base"] = "frozen"
    """`frozen` keeps its weights. `live` takes the weight versions that the learner publishes. `ema` keeps an
    exponential moving average of them. `refresh_every` sets which versions they take. `base` is the student without its
    adapters (`learner.lora`): the learner computes it, without a second copy of the weights and without a server. All
    but `frozen` belong to one run."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay for `kind: ema`, applied once per version: average = decay * average + (1 - decay) * student."""
    refresh_every: Positive = 1
    """Steps between two versions that a teacher of `kind: live` or `ema` takes; in between its weights stay. With `ema`
    the decay is applied once per version taken."""
    backend: Literal["transformers", "vllm", "remote"] = "transformers"
    """Library that runs the teacher's forward passes. `remote` runs none: it asks the server at `endpoint`."""
    endpoint: str | None = None
    """Address of a vLLM server (``vllm serve``) that holds the teacher's weights, `remote` only, for example
    ``http://HOST:8000``. Of `model` only the tokenizer and the configuration are read then."""
    endpoint_model: str | None = None
    """Name under which `endpoint` serves the model. Default: the only name that it serves."""
    endpoint_key_file: Path | None = None
    """File that holds the API key of `endpoint` and nothing else."""
    device_map: str | None = None
    """Device of each layer, `transformers` only; `auto` spreads a model over several GPUs. Default: one device."""
    tensor_parallel_size: Positive = 1
    """GPUs that share one model, `vllm` only."""
    gpu_memory_utilization: Fraction | None = None
    """Share of a GPU's memory for the engine and its cached contexts, `vllm` on GPUs only. Default: 0.9, or 0.9 of
    `gpus` if that is below 1."""
    max_k: Positive = 1024
    """Upper bound for `loss.top_k` of the runs that use this teacher."""
    max_sequence_tokens: Positive | None = None
    """Upper bound for context plus prompt plus response. Default: the model's own limit."""
    max_items: Positive = 1024
    """Upper bound for items per request."""
    max_body_bytes: Positive = 256 * 1024 * 1024
    """Upper bound for the size of a request."""
    batch_tokens: Positive = 8192
    """Upper bound for prompt plus response tokens of one forward pass; context tokens do not count."""
    batch_items: Positive | None = None
    """Upper bound for items of one forward pass. Default: no bound but `batch_tokens`. With 1, an item's scores are
    bit-identical in every batch."""
    batch_window_ms: Annotated[float, Field(ge=0)] = 5.0
    """Milliseconds to wait for more requests while a batch is not full."""
    max_queued_tokens: Positive = 4 * 1024 * 1024
    """Upper bound for tokens in the queue; the server refuses further requests with a time to retry."""
    context_cache_bytes: Positive = 4 * 1024**3
    """Memory for the key-value states of contexts; which of them leave first is in docs/tuning.md. With `vllm` on CPU
    this is the engine's whole key-value cache. With `vllm` on GPUs the engine has what `gpu_memory_utilization` leaves,
    and recomputes contexts that it evicts."""
    context_host_bytes: Annotated[int, Field(ge=0)] = 0
    """Host memory for key-value states that leave a GPU when `context_cache_bytes` is full, `transformers` only; they
    come back when an item needs them. Default: none, evicted contexts are computed again."""
    server_keys_file: Path | None = None
    """Server: file with one ``TENANT SHA256`` line per client key (`opcd key` makes them)."""
    allow_anonymous: bool = False
    """Server on a loopback address: accept clients without a key, all as one tenant."""
    tls_certificate: Path | None = None
    """Server: PEM certificate chain. Together with `tls_key` it turns on HTTPS."""
    tls_key: Path | None = None
    """Server: PEM private key of `tls_certificate`."""
    log_requests: bool = False
    """Server: log one line for each score request, with tenant, run, request id, status, size and seconds."""
    trace_endpoint: str | None = None
    """Server: OpenTelemetry collector that takes spans as OTLP over HTTP, for example
    ``http://collector:4318/v1/traces``."""
    client_key_file: Path | None = None
    """Run with a `url`: file that holds the run's key and nothing else."""
    ca_file: Path | None = None
    """PEM bundle to trust instead of the system's, for an ``https`` `url` or `endpoint`."""
    threads: Positive | None = None
    """CPU threads of the forward pass. Default: torch's choice."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs to reserve for a teacher that the run starts. With 0 it computes on CPU; below 1 it shares a GPU, and takes
    at most this share of its memory."""
    request_timeout_s: PositiveFloat = 600.0
    """Deadline for one request of the client, and for one to `endpoint`, retries included."""
    max_failed_fraction: Fraction = 0.0
    """Upper bound for the share of a step's samples that the teacher fails to score. These samples are counted and left
    out; above the bound the run stops."""

    @property
    def listen_host(self) -> str:
        """`host`, or the loopback address."""
        return self.host or LOOPBACK

    @model_validator(mode="after")
    def _keys_fit_the_backend(self) -> TeacherConfig:
        if self.kind in ("live", "ema") and self.backend != "transformers":
            raise ValueError(f"kind `{self.kind}` receives new weights, which backend `{self.backend}` cannot")
        if self.backend == "remote":
            _require_endpoint(self)
        elif self.endpoint is not None:
            raise ValueError(f"endpoint is for backend `remote`, not `{self.backend}`")
        if self.endpoint is None and (self.endpoint_model is not None or self.endpoint_key_file is not None):
            raise ValueError("endpoint_model and endpoint_key_file need endpoint")
        if self.context_host_bytes and self.backend != "transformers":
            raise ValueError(
                f"context_host_bytes is for backend `transformers`: the engine of `{self.backend}` keeps the states"
            )
        if self.refresh_every > 1 and self.kind not in ("live", "ema"):
            raise ValueError(
                f"refresh_every is {self.refresh_every}, but kind `{self.kind}` keeps its weights: set kind to `live` "
                "or `ema`"
            )
        return self


def _require_endpoint(teacher: TeacherConfig) -> None:
    """Raise ValueError for a `remote` teacher without a usable address, or with keys of a model that it would load."""
    if teacher.endpoint is None:
        raise ValueError("backend `remote` needs endpoint, the address of the inference server")
    address = urlsplit(teacher.endpoint)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"endpoint {teacher.endpoint!r} is not an address: write it as http://HOST:PORT")
    if address.username is not None or address.password is not None or address.query or address.fragment:
        raise ValueError("endpoint holds more than an address: put the key into endpoint_key_file")
    if teacher.kind == "base":
        raise ValueError("kind `base` is computed by the learner: it has no endpoint")
    if teacher.model is None:
        raise ValueError("backend `remote` needs model, whose tokenizer and configuration it reads")
    loads = {
        "gpus": teacher.gpus > 0,
        "tensor_parallel_size": teacher.tensor_parallel_size > 1,
        "device_map": teacher.device_map is not None,
        "gpu_memory_utilization": teacher.gpu_memory_utilization is not None,
    }
    for key, is_set in loads.items():
        if is_set:
            raise ValueError(f"{key} is for a teacher that loads its model, and backend `remote` loads none: remove it")


class ContextConfig(Section):
    """The text that only the teacher sees. Set one of `text`, `file` and `pool`, or `from_rows`, or
    `from_rollout`."""

    text: str | None = None
    """The context itself."""
    file: Path | None = None
    """UTF-8 file that holds the context; every byte counts."""
    pool: Path | None = None
    """JSON lines with `id` and `text`, one context per line. Each sample gets one of them, chosen by run seed, step,
    row and sample."""
    from_rows: bool = False
    """Each row has its own context, in its column `context` or `teacher_messages`, or made by `data.teacher_template`.
    `text` or `file` may hold a text for all rows; it comes before the row's own."""
    from_rollout: str | None = None
    """``package.module:function`` that makes the context of each answer: ``async (row, prompt, response) -> text``, or
    None to leave the answer out (docs/contexts.md). `text` or `file` may hold a text for all rows."""
    max_concurrent_calls: Positive = 64
    """Upper bound for calls of `from_rollout` at a time, in each rollout worker."""
    call_timeout_s: PositiveFloat = 300.0
    """Deadline for one call of `from_rollout`. A call that fails counts as an answer without a score
    (`teacher.max_failed_fraction`)."""
    placement: Literal["prefix", "system", "user_prefix", "turns"] | None = None
    """Position of the context: before a raw prompt (`prefix`), in the system turn (`system`), or before the first user
    content (`user_prefix`). With `turns` the context is a list of messages in JSON or YAML, which become turns before
    the row's chat. Default: `prefix` for raw rows, `system` for chat rows."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template on the teacher's side. Default: `student.chat_template_kwargs`. Both prompts must
    end with the same tokens; if only the student's has more of them at its end, the teacher gets these too."""

    @property
    def by_row(self) -> bool:
        """True if rows or answers have contexts of their own, which travel with their samples."""
        return self.from_rows or self.from_rollout is not None

    @model_validator(mode="after")
    def _one_source(self) -> ContextConfig:
        sources = sum(source is not None for source in (self.text, self.file, self.pool))
        if self.placement == "turns" and (self.by_row or self.pool is not None):
            raise ValueError(
                "context.placement `turns` takes one list of messages, in context.file or context.text; rows with "
                "turns of their own have a column `teacher_messages`"
            )
        if self.from_rows and self.from_rollout is not None:
            raise ValueError("context.from_rows and context.from_rollout do not go together: the function gets the row")
        if self.by_row:
            key = "from_rows" if self.from_rows else "from_rollout"
            if self.pool is not None or sources > 1:
                raise ValueError(f"context.{key} takes at most one of context.text and context.file, and no pool")
        elif sources != 1:
            raise ValueError(
                "exactly one of context.text, context.file and context.pool must be set, or context.from_rows, or "
                "context.from_rollout"
            )
        return self

    def inline(self) -> ContextConfig:
        """Replace `file` by its text, for processes that cannot read the file. A pool stays: its texts travel with the
        samples.
        """
        return self if self.file is None else self.model_copy(update={"text": self.read(), "file": None})

    def read(self) -> str:
        """Return the text for all rows, byte for byte; empty if each row has its own and there is none for all.

        Raises ConfigError for an unreadable file and for a pool.
        """
        if self.pool is not None:
            raise ConfigError(
                f"context.pool: {self.pool} holds many contexts; this command needs context.text or context.file"
            )
        if self.text is not None:
            text, source = self.text, "context.text"
        elif self.file is not None:
            text, source = _read_context(self.file), f"context.file: {self.file}"
        else:
            return ""
        if not text.strip():
            raise ConfigError(f"{source} is empty: the teacher would see what the student sees")
        return text


def _read_context(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"context.file: cannot read {path}: {error.strerror}{seen_from(path)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"context.file: {path} is not UTF-8: {error}") from error
    if text.startswith("\ufeff"):
        raise ConfigError(
            f"context.file: {path} begins with a byte-order mark, which would be part of every prompt: save the "
            "file as UTF-8 without it"
        )
    return text


Column = Literal[
    "id",
    "prompt",
    "messages",
    "answer",
    "teacher",
    "environment",
    "options",
    "seed",
    "context",
    "teacher_messages",
    "tools",
]


class MixedData(Section):
    """A further set of training rows."""

    train: Path
    """Source of the rows, as `data.train`."""
    share: Annotated[float, Field(gt=0, lt=1)]
    """Share of every step's prompts."""
    teacher: str | None = None
    """Teacher of rows that name none (`teachers`). Default: the `teacher` section."""
    columns: dict[Column, str] | None = None
    """As `data.columns`, which is the default, as for the keys below."""
    user_template: str | None = None
    teacher_template: str | None = None
    labels: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    loss: MixedLoss = MixedLoss()


class DataConfig(Section):
    """Rows to train on (`train`), to choose a checkpoint by (`valid`) and to report on (`eval`). Each source is a file
    (JSON lines or `.parquet`), a data set `hf:NAME:CONFIG/SPLIT` (NAME may be a folder, `:CONFIG` is optional, SPLIT
    may be a slice), `game:FrozenLake?rows=512&seed=0&size=3`, or `reasoning_gym:TASK?size=512&seed=0`."""

    train: Path
    valid: Path | None = None
    eval: Path | None = None
    columns: dict[Column, str] = {}
    """Maps a row's column to the name of the source's column; dots reach into nested values, as in ``{answer:
    reward_model.ground_truth}``."""
    user_template: str | None = None
    """Text of a single user turn, for sources without a column `prompt` or `messages`; ``{column}`` is replaced by the
    source's value."""
    teacher_template: str | None = None
    """Text of the teacher's last user turn (`context.from_rows`), for example ``"{prompt}\\n\\nA worked
    solution:\\n{solution}"``; ``{prompt}`` is the student's last user turn, any other ``{column}`` the source's value.
    Earlier turns stay."""
    labels: tuple[str, ...] = ()
    """Texts that replace integer answers, counted from 0."""
    ignore: tuple[str, ...] = ()
    """Columns of the source to leave out, for example an `answer` that is no answer. Unused columns need no entry."""

    mix: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], MixedData] = {}
    """Further sets of training rows by name, each with its share of every step's prompts; `train` has the rest."""

    def of_mixed(self, name: str) -> DataConfig:
        """Return the settings of the rows of ``mix.NAME``: its own, and those of `data` for what it leaves out."""
        own = self.mix[name].model_dump(exclude={"share", "teacher", "loss"}, exclude_none=True)
        return self.model_copy(update={**own, "valid": None, "eval": None, "mix": {}})


class EvalConfig(Section):
    """Evaluation on held-out rows before, during and after training."""

    every: NonNegative = 0
    """Steps between evaluations on `data.valid`; the last step is evaluated as well. The best weights are kept in
    ``best/``. 0 evaluates `data.eval` alone, before and after training."""
    grader: str = "exact"
    """`exact`, `exact_casefold`, `contains`, `regex:PATTERN`, `answer_tag`, `math`, `reasoning_gym`, or your own
    function as `package.module:attribute` (docs/tasks.md)."""
    max_tokens: Positive | None = None
    """Upper bound for tokens per answer. Default: `rollout.max_tokens`."""
    samples: Positive = 1
    """Answers per row. The accuracy is pass@1: the mean over rows of a row's share of right answers."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Top-p (nucleus) filter; needs a temperature above 0."""
    top_k: NonNegative = 0
    """Top-k filter, 0 for none; needs a temperature above 0."""
    ood: dict[str, Path] = {}
    """Maps a name to rows of another task. They are graded before and after training, without the context, to show
    forgetting."""
    perplexity: dict[str, Path] = {}
    """Maps a name to a text file. The learner predicts it before and after training (nats per token, no context), to
    show forgetting."""
    perplexity_chunk_tokens: Annotated[int, Field(ge=2)] = 512
    """Upper bound for tokens per chunk; each chunk of a text is predicted separately."""


class ExperienceConfig(Section):
    """`opcd experience`: a model writes contexts from its own attempts, before the run that distils them."""

    model: str | None = None
    """Model that solves the problems and writes down lessons. Default: the student's initial model. The tokenizer must
    be the student's."""
    seeds: Positive = 10
    """Independent series of problems, each in its own random order."""
    problems: Positive = 30
    """Problems of `data.train` per series. Every problem yields one context: seeds x problems in total."""
    max_context_tokens: Positive = 8192
    """Upper bound for a context's tokens; the oldest items are dropped first."""
    max_tokens: Positive | None = None
    """Upper bound for tokens of an answer that lists lessons. Default: `rollout.max_tokens`."""
    templates: Path | None = None
    """Folder with your own prompts (`extract.txt`, `extract_game.txt`, `context.txt`). Default: the built-in ones."""
    select: Literal["random", "validation"] = "random"
    """Contexts to keep: a random choice, or those with the highest accuracy on `data.valid`."""
    keep: Positive | None = None
    """Number of contexts to keep. Default: all with `random`, one with `validation`."""
    candidates: Positive | None = None
    """Number of randomly chosen contexts that `validation` tries. Default: all."""
