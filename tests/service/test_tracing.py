"""When traces are exported, which modules a process loads for that, and the context that travels with a job."""

from __future__ import annotations

import json
import os

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from patchforge.service import tracing
from patchforge.service.tracing import carrier, exporters_wanted
from tests.processes import PYTHON, run

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, []),
        ({"OTEL_SERVICE_NAME": "pictures", "OTEL_TRACES_SAMPLER": "always_on"}, []),
        ({ENDPOINT: "http://collector:4318"}, ["otlp_proto_http"]),
        ({ENDPOINT: " "}, []),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, ["otlp_proto_http"]),
        ({ENDPOINT: "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, []),
        ({ENDPOINT: "http://collector:4318", "OTEL_SDK_DISABLED": "True"}, []),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ["otlp_proto_http", "console"]),
        ({ENDPOINT: "http://collector:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ["otlp_proto_grpc"]),
        ({ENDPOINT: "x", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, ["otlp_proto_http"]),
    ],
)
def test_the_standard_variables_decide(environment: dict[str, str], wanted: list[str]) -> None:
    assert exporters_wanted(environment) == wanted


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in filter(lambda name: name.startswith("OTEL_"), os.environ):
        monkeypatch.delenv(name)


def traced_run(program: str, **variables: str) -> str:
    """Output of a process of its own, because a process keeps its first tracer provider."""
    return run(*PYTHON, program, **variables).stdout


def test_without_them_neither_tracing_sdk_nor_exporter_is_loaded() -> None:
    """redis-py itself loads the SDK's metrics if they are installed, but nothing else of it."""
    traced_run(
        "import sys\n"
        "from patchforge.service.tracing import TRACER, carrier, traced\n"
        "import patchforge.service.gateway.app, patchforge.service.worker.main, patchforge.service.supervisor\n"
        "with traced('gateway'), TRACER.start_as_current_span('work') as span:\n"
        "    assert not span.is_recording()\n"
        "    assert carrier() == {}\n"
        "loaded = ('opentelemetry.sdk.trace', 'opentelemetry.exporter')\n"
        "found = [name for name in sys.modules if name.startswith(loaded)]\n"
        "assert not found, found\n"
    )


def test_a_broken_setup_is_logged_and_the_body_runs() -> None:
    program = (
        "import sys\n"
        "from patchforge.service.tracing import traced\n"
        "sys.modules['opentelemetry.sdk'] = None  # as if only half of it were installed\n"
        "with traced('worker'):\n"
        "    print('it runs')\n"
    )
    ran = traced_run(program, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4318")
    for text in ("it runs", "cannot be exported", "opentelemetry.sdk"):
        assert text in ran


def test_the_console_exporter_prints_what_the_body_traced() -> None:
    program = (
        "from patchforge.service.tracing import TRACER, traced\n"
        "with traced('worker'), TRACER.start_as_current_span('work'):\n"
        "    pass\n"
    )
    shown = traced_run(program, OTEL_TRACES_EXPORTER="console")
    assert '"name": "work"' in shown
    assert '"service.name": "patchforge-worker"' in shown
    shown = traced_run(program, OTEL_TRACES_EXPORTER="console", OTEL_SERVICE_NAME="pictures")
    assert '"service.name": "pictures"' in shown
    named = traced_run(program, OTEL_TRACES_EXPORTER="console", OTEL_RESOURCE_ATTRIBUTES="service.name=ours,team=art")
    assert '"service.name": "ours"' in named
    assert '"team": "art"' in named
    assert '"work"' not in traced_run(program, OTEL_TRACES_EXPORTER="console", OTEL_TRACES_SAMPLER="always_off")


def test_a_dead_letter_has_the_span_that_its_workers_lost() -> None:
    program = (
        "from patchforge.service.messages.schemas import GenerationRequest, Job, JobError, JobStatus\n"
        "from patchforge.service.tracing import ended_in_queue, traced\n"
        "request = GenerationRequest(model='emoji', prompt='a secret')\n"
        "error = JobError(code='dead_letter', message='given up after 3 attempts')\n"
        "times = {'created_at': 1000.0, 'started_at': 1001.0, 'finished_at': 1061.5}\n"
        "with traced('gateway'):\n"
        "    ended_in_queue(Job(id='J', status=JobStatus.FAILED, request=request, attempt=3, error=error, **times))\n"
    )
    printed = traced_run(program, OTEL_TRACES_EXPORTER="console")  # after the log, which is not set up here
    span = json.loads(printed[printed.index("{\n") :])
    assert span["name"] == "job"
    assert (span["start_time"], span["end_time"]) == ("1970-01-01T00:16:41.000000Z", "1970-01-01T00:17:41.500000Z")
    assert span["status"] == {"status_code": "ERROR", "description": "given up after 3 attempts"}
    assert span["attributes"]["error.type"] == "dead_letter"
    assert span["attributes"]["patchforge.attempt"] == 3
    assert "secret" not in json.dumps(span)


def in_a_span(state: list[tuple[str, str]]) -> dict[str, str]:
    place = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1), trace_state=TraceState(state))
    with trace.use_span(NonRecordingSpan(place)):
        return carrier()


def test_a_job_carries_the_w3c_trace_context() -> None:
    parent = f"00-{1:032x}-{2:016x}-01"
    assert carrier() == {}
    assert in_a_span([]) == {"traceparent": parent}
    assert in_a_span([("vendor", "opaque")]) == {"traceparent": parent, "tracestate": "vendor=opaque"}


def test_a_tracestate_that_is_too_long_is_left_out() -> None:
    long = [(f"vendor{number}", "x" * 200) for number in range(3)]
    assert in_a_span(long).keys() == {"traceparent"}
    assert len(in_a_span(long[:2])["tracestate"]) <= tracing.MAX_TRACESTATE
