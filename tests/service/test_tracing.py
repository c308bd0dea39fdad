"""When traces are exported, what a process loads for them, and what travels with a job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from service import tracing
from service.tracing import carrier, exporters_wanted

ROOT = Path(__file__).parents[2]
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


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, for a process has one tracer provider for good."""
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    return ran


def test_without_them_neither_tracing_sdk_nor_exporter_is_loaded() -> None:
    """redis-py loads the SDK's metrics by itself wherever they are installed, and leaves it at that."""
    run(
        "import sys\n"
        "from service.tracing import TRACER, carrier, traced\n"
        "import service.gateway.app, service.worker.main, service.supervisor\n"
        "with traced('gateway'), TRACER.start_as_current_span('work') as span:\n"
        "    assert not span.is_recording()\n"
        "    assert carrier() == {}\n"
        "loaded = ('opentelemetry.sdk.trace', 'opentelemetry.exporter')\n"
        "found = [name for name in sys.modules if name.startswith(loaded)]\n"
        "assert not found, found\n"
    )


def test_a_broken_setup_is_said_and_the_body_runs() -> None:
    program = (
        "import sys\n"
        "from service.tracing import traced\n"
        "sys.modules['opentelemetry.sdk'] = None  # as if only half of it were installed\n"
        "with traced('worker'):\n"
        "    print('it runs')\n"
    )
    ran = run(program, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4318")
    assert "it runs" in ran.stdout
    assert "cannot be exported" in ran.stdout + ran.stderr
    assert "opentelemetry.sdk" in ran.stdout + ran.stderr


def test_the_console_exporter_prints_what_the_body_traced() -> None:
    program = (
        "from service.tracing import TRACER, traced\n"
        "with traced('worker'), TRACER.start_as_current_span('work'):\n"
        "    pass\n"
    )
    shown = run(program, OTEL_TRACES_EXPORTER="console").stdout
    assert '"name": "work"' in shown
    assert '"service.name": "patchforge-worker"' in shown
    shown = run(program, OTEL_TRACES_EXPORTER="console", OTEL_SERVICE_NAME="pictures").stdout
    assert '"service.name": "pictures"' in shown
    named = run(program, OTEL_TRACES_EXPORTER="console", OTEL_RESOURCE_ATTRIBUTES="service.name=ours,team=art").stdout
    assert '"service.name": "ours"' in named
    assert '"team": "art"' in named
    assert not run(program, OTEL_TRACES_EXPORTER="console", OTEL_TRACES_SAMPLER="always_off").stdout.count('"work"')


def test_a_dead_letter_has_the_span_its_workers_took_with_them() -> None:
    program = (
        "from service.schemas import GenerationRequest, Job, JobError, JobStatus\n"
        "from service.tracing import ended_in_queue, traced\n"
        "request = GenerationRequest(model='emoji', prompt='a secret')\n"
        "error = JobError(code='dead_letter', message='given up after 3 attempts')\n"
        "times = {'created_at': 1000.0, 'started_at': 1001.0, 'finished_at': 1061.5}\n"
        "with traced('gateway'):\n"
        "    ended_in_queue(Job(id='J', status=JobStatus.FAILED, request=request, attempt=3, error=error, **times))\n"
    )
    printed = run(program, OTEL_TRACES_EXPORTER="console").stdout  # after the log, which is not set up here
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


def test_what_travels_with_a_job_is_the_w3c_trace_context() -> None:
    parent = f"00-{1:032x}-{2:016x}-01"
    assert carrier() == {}
    assert in_a_span([]) == {"traceparent": parent}
    assert in_a_span([("vendor", "opaque")]) == {"traceparent": parent, "tracestate": "vendor=opaque"}


def test_a_tracestate_longer_than_anyone_has_to_pass_on_stays_behind() -> None:
    long = [(f"vendor{number}", "x" * 200) for number in range(3)]
    assert in_a_span(long).keys() == {"traceparent"}
    assert len(in_a_span(long[:2])["tracestate"]) <= tracing.LONGEST_STATE
