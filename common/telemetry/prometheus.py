"""A run's numbers for Prometheus: each value of ``metrics.jsonl`` as a gauge at ``http://host:port/metrics``, and what
the run's own teachers say of themselves.
"""

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
    """``kl/lower_bound`` becomes ``opcd_run_kl_lower_bound``."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9]+", "_", name).strip("_")


class PrometheusSink:
    """Serves the newest value of every number, with the label `run`, from a thread.

    Beside them ``opcd_run_step`` and ``opcd_run_updated_timestamp_seconds``, by which a run that stands still is seen.
    Port 0 takes any free one; `url` says which. Raises ConfigError where the address cannot be bound.
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
        """The next scrape shows them. Values that a step lacks stay as they were."""
        for name, value in {**values, "step": step, "updated_timestamp_seconds": time.time()}.items():
            self._gauge(name).labels(self._run).set(value)

    def relay(self, teacher: str, page: Callable[[], str]) -> None:
        """Show what `page` returns (Prometheus' text) at each scrape, too, with the label ``teacher``."""
        self._registry.register(_Relayed(teacher, page))

    def close(self) -> None:
        """Stop serving and give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str) -> Gauge:
        known = gauge_name(name)
        if known not in self._gauges:
            self._gauges[known] = Gauge(known, f"{name} of the newest step.", ["run"], registry=self._registry)
        return self._gauges[known]


class _Relayed(Collector):
    """Series of another page. One that does not answer is in the log, and missing from the scrape."""

    def __init__(self, teacher: str, page: Callable[[], str]) -> None:
        self._teacher = teacher
        self._page = page

    def describe(self) -> list[Metric]:
        """Nothing is known before it is asked: names of several teachers may be the same."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Its series of now."""
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
