"""Where a run's numbers go beside ``metrics.jsonl``: TensorBoard always, the others when asked."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from common.config.model import Config, ConfigError
from common.telemetry.prometheus import PrometheusSink

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the numbers of each step. ``metrics.jsonl`` has them all, so a sink that fails never ends a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of `step`, by their names in ``metrics.jsonl``; a step may come in several parts."""

    def close(self) -> None:
        """What was written is stored; nothing is written afterwards."""


def open_sinks(config: Config, *, resume: bool) -> Sequence[Sink]:
    """The sinks that `config.run` asks for; with `resume` they go on with what an earlier part of the run stored.

    Raises ConfigError where a package is missing or the metrics' port is taken.
    """
    with ExitStack() as opened:
        sinks: list[Sink] = []
        for sink in _asked(config, resume):
            opened.callback(sink.close)
            sinks.append(sink)
        opened.pop_all()
    return sinks


def _asked(config: Config, resume: bool) -> Iterator[Sink]:
    run = config.run
    if run.metrics_port is not None:
        yield PrometheusSink(run.name, run.metrics_host, run.metrics_port)
    if run.wandb is not None:
        yield WandbSink(config, run.wandb, resume=resume)
    if run.mlflow is not None:
        yield MlflowSink(config, run.mlflow, run.mlflow_uri, resume=resume)


class TensorBoardSink:
    """Event files in `folder`; `purge_step` and what comes after it are written anew."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars, on disk when this returns."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases under its project's name, with this run's name and configuration.

    ``wandb`` itself finds its key and its server (``WANDB_API_KEY``, ``wandb login``), and waits for no network.
    """

    def __init__(self, config: Config, project: str, *, resume: bool) -> None:
        wandb = _optional("wandb", "run.wandb")
        entity, _, name = project.rpartition("/")
        kept = _Kept(config.run.path / "wandb.id", resume)
        self._run = wandb.init(
            project=name,
            entity=entity or None,
            name=config.run.name,
            id=kept.id,
            resume="allow",
            dir=str(config.run.path),
            config=config.model_dump(mode="json"),
        )
        kept.keep(self._run.id)
        # wandb's own count never goes back, and a resumed run does steps again.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Queue them; wandb sends them from a process of its own."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send what is queued."""
        self._run.finish()


class MlflowSink:
    """A run of MLflow in `experiment`, with this run's name, at `uri` or where MLflow looks by itself."""

    def __init__(self, config: Config, experiment: str, uri: str | None, *, resume: bool) -> None:
        self._mlflow = _optional("mlflow", "run.mlflow")
        kept = _Kept(config.run.path / "mlflow.id", resume)
        if uri is not None:
            self._mlflow.set_tracking_uri(uri)
        try:
            self._mlflow.set_experiment(experiment)
            started = self._mlflow.start_run(run_id=kept.id, run_name=config.run.name)
            if kept.id is None:
                self._mlflow.log_dict(config.model_dump(mode="json"), "config.yaml")
        except self._mlflow.exceptions.MlflowException as error:
            raise ConfigError(
                f"run.mlflow: {self._mlflow.get_tracking_uri()} does not take the run: {error}"
            ) from error
        kept.keep(started.info.run_id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Store them; what the server does not take is in the log."""
        try:
            self._mlflow.log_metrics(dict(values), step=step)
        except self._mlflow.exceptions.MlflowException as error:
            log.warning("mlflow did not store step %d (metrics.jsonl has it): %s", step, error)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class _Kept:
    """An id that a tracker gave this run, kept beside the run's files to go on with."""

    def __init__(self, path: Path, resume: bool) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.id = path.read_text(encoding="utf-8").strip() if resume and path.exists() else None

    def keep(self, value: str) -> None:
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
