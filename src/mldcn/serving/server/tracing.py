"""Spans of requests for OpenTelemetry, which is only imported where they are asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from mldcn.errors import UserError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer, TracerProvider

HEADERS = ("traceparent", "tracestate")


class Trace:
    """The span of one request, and those of its stages inside it.

    Args:
        span: the request's, begun.
        tracer: makes those of the stages.
    """

    def __init__(self, span: Span, tracer: Tracer) -> None:
        from opentelemetry.trace import set_span_in_context

        self._span = span
        self._inside = set_span_in_context(span)
        self._tracer = tracer
        # Stages are measured by the clock that never jumps, spans are told by the one on the wall.
        self._offset = time.time_ns() - time.monotonic_ns()

    def stage(self, name: str, begun: float, ended: float, **attributes: Any) -> None:
        """Adds a stage that lasted from one ``time.monotonic()`` to another."""
        span = self._tracer.start_span(
            name, self._inside, attributes=attributes, start_time=self._wall(begun)
        )
        span.end(self._wall(ended))

    def end(self, name: str, facts: Mapping[str, Any], *, failed: bool) -> None:
        """Ends the request's span; ``facts`` are what the access log says of it."""
        from opentelemetry.trace import Status, StatusCode

        self._span.update_name(name)
        self._span.set_attributes({f"mldcn.{key}": value for key, value in facts.items()})
        if failed:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def _wall(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset


# The trace of the request that is being answered; None where there is none, or tracing is off.
current: ContextVar[Trace | None] = ContextVar("trace", default=None)


class Tracing:
    """Makes spans.

    Args:
        provider: of tracers.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("mldcn.serving")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def from_environment(cls) -> Tracing:
        """Spans sent by OTLP to where OpenTelemetry's environment variables say.

        Raises:
            UserError: the libraries are not there.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise UserError(f"--traces needs {error.name}; run: pip install 'mldcn[otel]'") from None
        named = Resource({SERVICE_NAME: "mldcn"}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=named)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def begin(self, headers: Mapping[str, str]) -> Trace:
        """The span of a request, inside the caller's where its headers say so."""
        from opentelemetry.trace import SpanKind

        # A header of hundreds of members would be parsed for nothing.
        carrier = {name: headers[name] for name in HEADERS if len(headers.get(name, "")) in range(1, 513)}
        context = self._propagator.extract(carrier)
        return Trace(self._tracer.start_span("request", context, kind=SpanKind.SERVER), self._tracer)

    def close(self) -> None:
        """Sends what is not sent yet."""
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            shutdown()
