"""Spans of requests: which there are, whose children they are, and none where nobody asked for any."""

import subprocess
import sys
import time

import pytest
import tritonclient.grpc as by_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from serving_clients import rows, serving
from test_repository import ask
from test_server import grpc_tensors, listless

from mldcn.serving.server.tracing import Tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
STAGES = {"decode", "encode", "queue", "score", "answer"}


@pytest.fixture(scope="module")
def spans():
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(served_run, spans):
    """A server whose spans are kept."""

    def provided(cls):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(spans))
        return cls(provider)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracing, "from_environment", classmethod(provided))
        with serving(served_run, traces=True) as running:
            yield running


def by_name(spans):
    """The spans of one request; its own is under None, and ends a moment after the answer was sent."""
    deadline = time.monotonic() + 10
    found = spans.get_finished_spans()
    while not any(span.kind is SpanKind.SERVER for span in found):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        found = spans.get_finished_spans()
    spans.clear()
    return {None if span.kind is SpanKind.SERVER else span.name: span for span in found}


def check(found, name, trace_id=TRACE, parent=PARENT):
    own = found[None]
    assert (own.name, own.status.status_code) == (name, StatusCode.UNSET)
    assert format(own.context.trace_id, "032x") == trace_id
    assert format(own.parent.span_id, "016x") == parent
    assert set(found) == {None, *STAGES}
    for stage in STAGES:
        span = found[stage]
        assert span.parent.span_id == own.context.span_id
        assert own.start_time - 1_000_000 <= span.start_time <= span.end_time <= own.end_time + 1_000_000
    starts = [found[stage].start_time for stage in ("decode", "encode", "queue", "score", "answer")]
    assert starts == sorted(starts)


def test_http_spans_join_the_callers_trace(traced, spans, engine):
    values = listless(rows(engine, 2))
    response = ask(traced.client, values, **{"traceparent": TRACEPARENT, "x-request-id": "r-1"})
    assert response.status_code == 200
    found = by_name(spans)
    check(found, "infer")
    facts = found[None].attributes
    assert (facts["mldcn.request_id"], facts["mldcn.status"], facts["mldcn.rows"]) == ("r-1", 200, 2)
    assert facts["mldcn.version"] == engine.version


def test_grpc_spans_join_the_callers_trace(traced, spans, engine):
    values = listless(rows(engine, 2))
    with by_grpc.InferenceServerClient(traced.grpc) as client:
        client.infer("ads", grpc_tensors(values), headers={"traceparent": TRACEPARENT})
    check(by_name(spans), "ModelInfer")


def test_a_request_without_a_trace_begins_one_and_probes_have_none(traced, spans, engine):
    assert traced.client.get("/v2/health/live").status_code == 200
    assert not spans.get_finished_spans()
    for wild in ({}, {"traceparent": "00-nonsense"}, {"traceparent": "x" * 10_000}):
        response = ask(traced.client, listless(rows(engine, 1)), model="none", **wild)
        assert response.status_code == 404
        found = by_name(spans)
        assert found[None].parent is None
        assert found[None].attributes["mldcn.refused"] == "not_found"


def test_a_failure_is_marked(traced, spans, engine, monkeypatch):
    served = traced.server.repository.models["ads"][0].engine

    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(served, "score_rows", broken)
    assert ask(traced.client, listless(rows(engine, 1))).status_code == 500
    assert by_name(spans)[None].status.status_code is StatusCode.ERROR


def test_nothing_is_imported_where_nobody_asks():
    code = "import mldcn.serving.server.server, sys; assert not any('opentelemetry.sdk' in m for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
