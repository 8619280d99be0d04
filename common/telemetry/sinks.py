"""Receivers of a run's metrics besides ``metrics.jsonl``: TensorBoard always, the others on request."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from common.config.model import Config, ConfigError
from common.telemetry.prometheus import PrometheusSink

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Receives the numbers of each step. ``metrics.jsonl`` has all of them, so a failing sink never ends a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers of `step`, named as in ``metrics.jsonl``; a step may come in several parts."""

    def close(self) -> None:
        """Store everything written so far; no `write` follows."""


def open_sinks(config: Config, *, resume: bool) -> Sequence[Sink]:
    """Open the sinks that `config.run` requests; with `resume` they continue those of the run's earlier part.

    Raises ConfigError if a package is missing or the metrics port is taken.
    """
    with ExitStack() as opened:
        sinks: list[Sink] = []
        for sink in _requested(config, resume):
            opened.callback(sink.close)
            sinks.append(sink)
        opened.pop_all()
    return sinks


def _requested(config: Config, resume: bool) -> Iterator[Sink]:
    run = config.run
    if run.metrics_port is not None:
        yield PrometheusSink(run.name, run.metrics_host, run.metrics_port)
    if run.wandb is not None:
        yield WandbSink(config, run.wandb, resume=resume)
    if run.mlflow is not None:
        yield MlflowSink(config, run.mlflow, run.mlflow_uri, resume=resume)


def as_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Turn rows into columns of text, which every tracker shows; a value that is no text becomes JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [_text(row.get(name)) for row in rows] for name in names}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class TensorBoardSink:
    """Event files in `folder`; a resumed run discards earlier events from `purge_step` on."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars and flush the file."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run in `project`, with this run's name and configuration.

    ``wandb`` finds its key and server itself (``WANDB_API_KEY``, ``wandb login``) and does not wait for the network.
    """

    def __init__(self, config: Config, project: str, *, resume: bool) -> None:
        self._wandb = wandb = _optional("wandb", "run.wandb")
        entity, _, name = project.rpartition("/")
        stored = _StoredId(config.run.path / "wandb.id", resume)
        self._run = wandb.init(
            project=name,
            entity=entity or None,
            name=config.run.name,
            id=stored.id,
            resume="allow",
            dir=str(config.run.path),
            config=config.model_dump(mode="json"),
        )
        stored.store(self._run.id)
        # wandb's own step count never decreases, and a resumed run repeats steps.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the numbers; wandb sends them from another process."""
        self._run.log({"step": step, **values})

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Queue a table ``samples/NAME``."""
        columns = as_columns(rows)
        data = [list(row) for row in zip(*columns.values(), strict=True)]
        self._run.log({"step": step, f"samples/{name}": self._wandb.Table(columns=list(columns), data=data)})

    def close(self) -> None:
        """Send all queued numbers."""
        self._run.finish()


class MlflowSink:
    """An MLflow run in `experiment`, with this run's name, at `uri` or MLflow's default."""

    def __init__(self, config: Config, experiment: str, uri: str | None, *, resume: bool) -> None:
        self._mlflow = _optional("mlflow", "run.mlflow")
        stored = _StoredId(config.run.path / "mlflow.id", resume)
        if uri is not None:
            self._mlflow.set_tracking_uri(uri)
        try:
            self._mlflow.set_experiment(experiment)
            started = self._mlflow.start_run(run_id=stored.id, run_name=config.run.name)
            if stored.id is None:
                self._mlflow.log_dict(config.model_dump(mode="json"), "config.yaml")
        except self._mlflow.exceptions.MlflowException as error:
            raise ConfigError(
                f"run.mlflow: {self._mlflow.get_tracking_uri()} does not take the run: {error}"
            ) from error
        stored.store(started.info.run_id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Store the numbers; log a warning if the server rejects them."""
        try:
            self._mlflow.log_metrics(dict(values), step=step)
        except self._mlflow.exceptions.MlflowException as error:
            log.warning("mlflow did not store step %d (metrics.jsonl has it): %s", step, error)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store a table ``samples/NAME-STEP.json``; log a warning if the server rejects it, or without pandas, which
        mlflow needs for tables and ``mlflow-skinny`` does not install.
        """
        try:
            self._mlflow.log_table(as_columns(rows), f"samples/{name.replace('/', '-')}-{step:06d}.json")
        except (self._mlflow.exceptions.MlflowException, ImportError) as error:
            log.warning("mlflow did not store the answers of %s (samples.jsonl has them): %s", name, error)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class _StoredId:
    """A tracker's id of this run, stored with the run's files for a resume."""

    def __init__(self, path: Path, resume: bool) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.id = path.read_text(encoding="utf-8").strip() if resume and path.exists() else None

    def store(self, value: str) -> None:
        self._path.write_text(value + "\n", encoding="utf-8")


def _optional(package: str, key: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(
            f"{key} needs the package {package}, which is not installed: pip install {package}"
        ) from error
