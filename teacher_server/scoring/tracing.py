"""OpenTelemetry spans of score requests, sent to ``teacher.trace_endpoint``. They hold no token ids and no keys."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager

from opentelemetry.trace import NoOpTracer, Span, SpanKind, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.protocol.fields import SHOWN_CHARACTERS
from teacher_server.scoring.scheduler import BatchReport, Submission

NAME = "opcd.teacher"


class Tracing:
    """Makes the spans of one server; without an endpoint they are empty and cost microseconds."""

    def __init__(self, endpoint: str | None) -> None:
        """`endpoint` takes OTLP over HTTP, for example ``http://collector:4318/v1/traces``."""
        self._provider = None
        self._tracer: Tracer = NoOpTracer()
        if endpoint is None:
            return
        # The exporter and its parts take half a second to import.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "opcd-teacher"}),
            span_limits=SpanLimits(max_span_attribute_length=SHOWN_CHARACTERS),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer(NAME)

    def request(self, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
        """Scope of one request; its parent is the span that the header ``traceparent`` names."""
        context = TraceContextTextMapPropagator().extract(headers) if self._provider is not None else None
        return self._tracer.start_as_current_span(
            "POST /v1/score", context, SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        )

    def part(self, name: str) -> AbstractContextManager[Span]:
        """Scope of a part of the current request."""
        return self._tracer.start_as_current_span(name, record_exception=False)

    def record_batch(self, report: BatchReport) -> None:
        """Add the waits and the batch to each request that has items in the batch."""
        if self._provider is None:
            return
        items: dict[Submission, int] = {}
        for job in report.jobs:
            items[job.submission] = items.get(job.submission, 0) + 1
        offset = time.time() - time.monotonic()
        began, ended = report.began + offset, report.began + report.seconds + offset
        for submission, count in items.items():
            context = set_span_in_context(submission.span)
            for name, start, end in (("queue", submission.queued_at + offset, began), ("batch", began, ended)):
                span = self._tracer.start_span(name, context, start_time=int(start * 1e9))
                span.set_attribute("opcd.items", count)
                if name == "batch":
                    span.set_attributes({"opcd.batch.items": len(report.jobs), "opcd.batch.tokens": report.own_tokens})
                span.end(int(end * 1e9))

    def close(self) -> None:
        """Send what is left; blocks."""
        if self._provider is not None:
            self._provider.shutdown()
