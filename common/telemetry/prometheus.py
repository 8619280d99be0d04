"""Metrics of a run for Prometheus: each value of ``metrics.jsonl`` as a gauge, and the metrics of its teachers."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from common.config.model import ConfigError

log = logging.getLogger(__name__)

PREFIX = "opcd_run_"


def gauge_name(name: str) -> str:
    """Prometheus name of a metric: ``kl/lower_bound`` becomes ``opcd_run_kl_lower_bound``."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9]+", "_", name).strip("_")


class PrometheusSink:
    """Serves the latest value of every metric, labelled `run`, at ``http://host:port/metrics`` from a thread.

    ``opcd_run_step`` and ``opcd_run_updated_timestamp_seconds`` reveal a run that makes no progress. Port 0 takes any
    free port; `url` names it. Raises ConfigError if the address cannot be bound.
    """

    def __init__(self, run: str, host: str, port: int) -> None:
        self._run = run
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise ConfigError(
                f"run.metrics_port: cannot listen on {host}:{port}: {error.strerror}; 0 takes any free port"
            ) from error
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Update the gauges; metrics that a step lacks keep their last value."""
        for name, value in {**values, "step": step, "updated_timestamp_seconds": time.time()}.items():
            self._gauge(name).labels(self._run).set(value)

    def relay(self, teacher: str, page: Callable[[], str]) -> None:
        """Add the series of `page` (Prometheus text), labelled ``teacher``, to every scrape."""
        self._registry.register(_RelayedPage(teacher, page))

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str) -> Gauge:
        gauge = gauge_name(name)
        if gauge not in self._gauges:
            self._gauges[gauge] = Gauge(gauge, f"{name} of the latest step.", ["run"], registry=self._registry)
        return self._gauges[gauge]


class _RelayedPage(Collector):
    """Series of another page; if it does not answer, the scrape lacks them and the log says why."""

    def __init__(self, teacher: str, page: Callable[[], str]) -> None:
        self._teacher = teacher
        self._page = page

    def describe(self) -> list[Metric]:
        """Declare no names in advance: several teachers have the same ones."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Fetch the page and label its series."""
        try:
            text = self._page()
        except OSError as error:
            log.warning("the metrics of teacher %r could not be read: %s", self._teacher, error)
            return
        for family in text_string_to_metric_families(text):
            family.samples = [
                sample._replace(labels={**sample.labels, "teacher": self._teacher}) for sample in family.samples
            ]
            yield family
