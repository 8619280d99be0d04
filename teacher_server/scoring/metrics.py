"""Prometheus series of ``/metrics``. Each server has its own registry: one process may hold several servers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MAX_RUNS = 200
"""Runs of one tenant that get their own series. Later runs share the tenant's ``other``."""

OTHER = "other"

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TOKENS = (16, 64, 256, 1024, 4096, 16_384, 65_536)


class Metrics:
    """All series of one server. `run` labels are ``tenant/run``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._runs: dict[str, set[str]] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"opcd_teacher_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"opcd_teacher_{name}", text, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"opcd_teacher_{name}", text, labels, registry=self.registry, buckets=buckets)

        self.requests = counter("requests", "Score requests, by HTTP status.", "run", "status")
        self.rejected = counter("rejected", "Requests and items not scored, by reason.", "run", "reason")
        self.tokens_scored = counter("tokens_scored", "Response tokens scored.", "run")
        self.tokens_computed = counter("tokens_computed", "Prompt and response tokens run through the model.", "run")
        self.context_computed = counter("context_tokens_computed", "Context tokens run through the model.", "run")
        self.context_saved = counter(
            "context_tokens_saved", "Context tokens that the cache kept from running again.", "run"
        )
        self.floored = counter("values_floored", "Log-probabilities clamped to the floor.", "run")
        self.unauthorised = counter("unauthorised", "Requests without a valid key.")
        self.bytes_in = counter("bytes_in", "Bytes of score requests' bodies.", "run")
        self.context_bytes_in = counter("context_bytes_in", "Bytes of contexts' bodies.", "tenant")
        self.bytes_out = counter("bytes_out", "Bytes of replies.", "run")
        self.repeated = counter("requests_repeated", "Requests answered from an earlier or running computation.", "run")
        self.queue_s = histogram("queue_seconds", "From arrival of an item to the start of its batch.", _SECONDS, "run")
        self.batch_s = histogram("batch_seconds", "Duration of a batch.", _SECONDS)
        self.batch_items = histogram("batch_items", "Items of a batch.", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
        self.batch_tokens = histogram("batch_tokens", "Prompt and response tokens of a batch.", _TOKENS)
        self.queued_tokens = gauge("queued_tokens", "Waiting tokens.")
        self.cache_hits = gauge("context_cache_hits", "Look-ups of a context state that found it.")
        self.cache_misses = gauge("context_cache_misses", "Look-ups of a context state that computed it.")
        self.cache_evictions = gauge("context_cache_evictions", "Evicted context states.")
        self.cache_bytes = gauge("context_cache_bytes", "Memory of the cached context states on the device.")
        self.cache_host_bytes = gauge("context_cache_host_bytes", "Host memory of the context states moved there.")
        self.cache_restored = gauge("context_cache_restored", "Context states moved back from the host.")
        self.body_bytes = gauge("body_bytes", "Memory of the request bodies in progress.")
        self.reply_bytes = gauge("reply_bytes", "Memory of the replies kept for repeated requests.")

    def run(self, tenant: str, run: str) -> str:
        """Label of a run with a valid request: its own label for the first `MAX_RUNS` runs of its tenant.

        Invented names can neither grow the registry without bound nor take the labels of other tenants.
        """
        runs = self._runs.setdefault(tenant, set())
        if len(runs) < MAX_RUNS:
            runs.add(run)
        return self.known(tenant, run)

    def known(self, tenant: str, run: str) -> str:
        """Label of any run name, which may be invented: ``TENANT/other`` if the run has no own label."""
        return f"{tenant}/{run if run in self._runs.get(tenant, ()) else OTHER}"

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)
