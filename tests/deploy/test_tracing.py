"""Traces of real processes, as a collector gets them; and what happens without a collector."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from patchforge.service.embedded import free_port
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from tests.deploy.collector import Collector, Sent
from tests.faults.gateways import LONG, MEDIUM, SHORT, Gateway
from tests.faults.harness import Stack
from tests.faults.saboteur import RAISES

SOON = {"patch_budget": 4096, "drain_seconds": 5}
CALLER = "00f067aa0ba902b7"  # the span of whoever calls
OPERATION = Path(__file__).parents[2] / "docs" / "operation.md"


class Traced:
    """A gateway, a worker that can fail on request, and the collector of their spans."""

    def __init__(self, stack: Stack, collector: Collector) -> None:
        self.stack, self.collector = stack, collector
        self.gateway, self.worker = stack.start_pair("saboteur")

    def submit(self, traceparent: str | None, **changes: Any) -> str:
        headers = {} if traceparent is None else {"traceparent": traceparent}
        answer = self.gateway.http.post("/v1/jobs", json=SHORT | changes, headers=headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def trace_of(self, submit: Callable[[str], Any], **outcome: str) -> list[Sent]:
        """Makes a call with this traceparent, waits until its job ends with this status, and returns the spans."""
        trace = uuid4().hex
        submit(f"00-{trace}-{CALLER}-01")
        done = {f"patchforge.{name}": value for name, value in (outcome or {"outcome": "completed"}).items()}

        def complete(spans: list[Sent]) -> bool:
            # Gateway and worker send their spans in any order.
            ended = any(done.items() <= span.attributes.items() for span in spans)
            return ended and any(span.kind == Span.SPAN_KIND_SERVER for span in spans)

        return self.collector.until(complete, trace)


@contextmanager
def traced_to(url: str, delay: int = 50, **more: str) -> Iterator[None]:
    """Processes started in this block send their spans there, every `delay` milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", str(delay))
        for name, value in more.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, bundle_dir: Path) -> Iterator[Traced]:
    with (
        Collector() as collector,
        Stack(tmp_path_factory.mktemp("traced"), bundle_dir, **SOON) as stack,
        traced_to(collector.url),
    ):
        yield Traced(stack, collector)


def named(spans: list[Sent], name: str) -> list[Sent]:
    return [span for span in spans if span.name == name]


def holds_together(spans: list[Sent], call: str) -> None:
    """Caller → call → queue wait and job → steps, in this order, and nothing else."""
    [entry], [wait], [job] = named(spans, call), named(spans, "queue wait"), named(spans, "job")
    steps = named(spans, "step")
    assert len(steps) == len(spans) - 3 == SHORT["steps"]
    assert (entry.parent, wait.parent, job.parent) == (CALLER, entry.id, entry.id)
    assert {step.parent for step in steps} == {job.id}
    assert (entry.kind, job.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CONSUMER)
    assert entry.service == "patchforge-gateway"
    assert {span.service for span in spans} == {"patchforge-gateway", "patchforge-worker"}
    assert wait.start <= wait.end <= job.start <= steps[0].start
    assert all(one.end <= next.start for one, next in pairwise(steps))
    assert steps[-1].end <= job.end
    assert not any(span.failed for span in spans)
    assert {span.attributes["patchforge.job"] for span in (entry, wait, job)} == {job.attributes["patchforge.job"]}


def test_a_trace_goes_from_the_http_call_to_the_last_step(traced: Traced) -> None:
    spans = traced.trace_of(traced.submit)
    holds_together(spans, "POST /v1/jobs")
    [job], steps = named(spans, "job"), named(spans, "step")
    stored = traced.gateway.job(job.attributes["patchforge.job"])
    report = stored["report"]
    assert job.attributes == {
        "patchforge.job": stored["id"],
        "patchforge.model": "tiny-class",
        "patchforge.sampler": "euler",
        "patchforge.steps": 4,
        "patchforge.pictures": 1,
        "patchforge.priority": "normal",
        "patchforge.attempt": 1,
        "patchforge.outcome": "completed",
        "patchforge.patch_evaluations": report["patch_evaluations"],
        "patchforge.patch_evaluations_saved": report["dense_patch_evaluations"] - report["patch_evaluations"],
    }
    assert sum(step.attributes["patchforge.patches"] for step in steps) == report["patch_evaluations"]
    assert {step.attributes["patchforge.step.jobs"] for step in steps} == {1}
    [wait] = named(spans, "queue wait")
    assert (wait.end - wait.start) / 1e9 == pytest.approx(stored["started_at"] - stored["created_at"], abs=1e-6)


def test_and_from_a_grpc_call(traced: Traced) -> None:
    wanted = pb.Generation(class_label="cat", euler=pb.EulerSampler(), steps=SHORT["steps"], guidance=2.0)

    def generate(traceparent: str) -> None:
        with traced.gateway.grpc() as stub:
            metadata = (("traceparent", traceparent),)
            assert list(stub.GenerateImage(pb.GenerateImageRequest(generation=wanted), metadata=metadata))

    def complete(spans: list[Sent]) -> bool:
        return bool(named(spans, "job") and named(spans, "patchforge.v1.ImageService/GenerateImage"))

    trace = uuid4().hex
    generate(f"00-{trace}-{CALLER}-01")
    spans = traced.collector.until(complete, trace)
    holds_together(spans, "patchforge.v1.ImageService/GenerateImage")
    [call] = named(spans, "patchforge.v1.ImageService/GenerateImage")
    assert call.attributes.items() >= {"rpc.system.name": "grpc", "rpc.response.status_code": "OK"}.items()


def test_a_grpc_call_that_is_refused_says_so(traced: Traced) -> None:
    trace, name = uuid4().hex, "patchforge.v1.ImageService/GetJob"
    with traced.gateway.grpc() as stub, pytest.raises(grpc.RpcError):
        stub.GetJob(pb.GetJobRequest(job_id="none"), metadata=(("traceparent", f"00-{trace}-{CALLER}-01"),))
    [call] = traced.collector.until(lambda spans: bool(spans), trace)
    assert (call.name, call.attributes["error.type"], call.failed) == (name, "NOT_FOUND", False)


def test_jobs_of_one_step_each_have_it_in_their_trace_and_link_to_the_first(traced: Traced) -> None:
    with traced.stack.device_held():
        traces = [uuid4().hex for _ in range(2)]
        jobs = [traced.submit(f"00-{trace}-{CALLER}-01", **MEDIUM) for trace in traces]
        for job in jobs:
            traced.gateway.until(job, "preview")
    one, other = (traced.collector.until(lambda spans: bool(named(spans, "job")), trace) for trace in traces)
    together = {
        (step.start, step.end): step for step in named(one, "step") if step.attributes["patchforge.step.jobs"] == 2
    }
    assert together
    for step in named(other, "step"):
        if mate := together.get((step.start, step.end)):
            assert (step.links, mate.links) in [((mate.id,), ()), ((), (step.id,))]
            both = step.attributes["patchforge.patches"] + mate.attributes["patchforge.patches"]
            assert both == step.attributes["patchforge.step.patches"] == mate.attributes["patchforge.step.patches"]


def test_a_job_that_breaks_shows_where_and_why(traced: Traced) -> None:
    spans = traced.trace_of(lambda here: traced.submit(here, seed=RAISES), outcome="failed")
    [job], [step] = named(spans, "job"), named(spans, "step")
    for span in (job, step):
        assert span.failed
        assert span.attributes["error.type"] == "evaluation_failed"
        assert "RuntimeError" in span.message


def test_a_job_that_never_runs_has_its_wait(traced: Traced) -> None:
    with traced.stack.device_held():
        blockers = [traced.submit(None, **LONG | {"previews": False}) for _ in range(16)]
        for job in blockers:
            traced.gateway.until(job, "started")
        spans = traced.trace_of(lambda here: traced.submit(here, deadline_seconds=0.1), outcome="expired")
        for job in blockers:
            traced.gateway.cancel(job)
    [entry], [wait] = named(spans, "POST /v1/jobs"), named(spans, "queue wait")
    assert not named(spans, "job")
    assert (wait.parent, wait.failed, wait.attributes["error.type"]) == (entry.id, True, "expired")
    assert wait.end - wait.start >= 100_000_000


def test_who_is_not_sampled_leaves_nothing_and_who_does_not_say_is(traced: Traced) -> None:
    unsampled = uuid4().hex
    job = traced.submit(f"00-{unsampled}-{CALLER}-00")
    assert traced.gateway.ended(job)["status"] == "completed"
    job = traced.submit(None)

    def of_job(spans: list[Sent]) -> list[str]:
        return [span.trace for span in spans if span.name == "job" and span.attributes["patchforge.job"] == job]

    traced.gateway.ended(job)
    traced.collector.until(lambda _: bool(of_job(traced.collector.spans)), "")
    spans = traced.collector.until(lambda spans: len(spans) == 3 + SHORT["steps"], of_job(traced.collector.spans)[0])
    [root] = [span for span in spans if not span.parent]
    assert root.name == "POST /v1/jobs"
    assert unsampled not in {span.trace for span in traced.collector.spans}


def test_a_callers_nonsense_is_passed_over(traced: Traced) -> None:
    # Two of these stay below the 8 KiB above which gRPC refuses calls at random.
    for nonsense in ("", "00-zz-zz-01", f"00-{0:032x}-{CALLER}-01", "x" * 2000):
        assert traced.gateway.ended(traced.submit(nonsense))["status"] == "completed"
        with traced.gateway.grpc() as stub:
            stub.ListModels(pb.ListModelsRequest(), metadata=(("traceparent", nonsense), ("tracestate", nonsense)))


def test_probes_and_scrapes_are_not_traced(traced: Traced) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/"):
        assert traced.gateway.http.get(path).status_code == 200
    traced.trace_of(traced.submit)
    assert {span.name for span in traced.collector.spans if span.kind == Span.SPAN_KIND_SERVER} <= {
        "POST /v1/jobs",
        "GET /v1/jobs/{job_id}",
        "GET /v1/jobs/{job_id}/events",
        "DELETE /v1/jobs/{job_id}",
        "patchforge.v1.ImageService/GenerateImage",
        "patchforge.v1.ImageService/GetJob",
        "patchforge.v1.ImageService/ListModels",
    }


def test_operation_md_names_every_attribute_of_ours(traced: Traced) -> None:
    traced.trace_of(traced.submit)
    seen = {name for span in traced.collector.spans for name in span.attributes if name.startswith("patchforge.")}
    text = OPERATION.read_text("utf-8").partition("\n## Traces\n")[2].partition("\n## ")[0]
    assert {name for name in seen if f"`{name}`" not in text} == set()


def test_a_graceful_stop_sends_what_is_left_and_tells_what_was_given_back(tmp_path: Path, bundle_dir: Path) -> None:
    with (
        Collector() as collector,
        Stack(tmp_path, bundle_dir, **SOON | {"drain_seconds": 1}) as stack,
        traced_to(collector.url, 3_600_000),
        stack.device_held(),
    ):
        worker, gateway = stack.launch_worker("held_device"), stack.start_gateway("patient_exporter")
        worker.wait_for("worker ready")
        gateway.await_ready()
        job = gateway.submit()
        gateway.until(job, "preview")
        assert not collector.spans
        for process in (gateway, worker):
            assert process.terminate() == 0
            assert not process.lines("the last traces were not exported in time")
        [trace] = {span.trace for span in collector.spans if span.attributes.get("patchforge.job") == job}
        spans = [span for span in collector.spans if span.trace == trace]
        assert {span.name for span in spans} == {"POST /v1/jobs", "queue wait", "job", "step"}
        assert named(spans, "job")[0].attributes["patchforge.outcome"] == "given_back"


def test_a_collector_that_is_away_or_silent_harms_nothing(tmp_path: Path, bundle_dir: Path) -> None:
    """More spans than the queue can hold, and a stop while none of them can be delivered."""
    small = {"OTEL_BSP_MAX_QUEUE_SIZE": "64", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "16"}
    with socket.create_server(("127.0.0.1", 0)) as silent, Stack(tmp_path, bundle_dir, **SOON) as stack:
        with traced_to(f"http://127.0.0.1:{free_port()}", **small):
            gateway = stack.start_gateway()
        with traced_to(f"http://127.0.0.1:{silent.getsockname()[1]}", **small):
            worker = stack.start_worker()
        gateway.await_ready()
        for job in [gateway.submit(MEDIUM | {"n": 1}) for _ in range(3)]:
            assert gateway.ended(job)["status"] == "completed"
        gateway.wait_for("tracing", logger="opentelemetry.exporter.otlp.proto.http.trace_exporter")
        for process in (worker, gateway):
            assert process.terminate() == 0, "though nobody takes its spans"
            assert not process.stray
        assert worker.lines("the last traces were not exported in time")


def test_an_exporter_that_is_not_installed_is_said_and_no_more(tmp_path: Path, bundle_dir: Path) -> None:
    with Stack(tmp_path, bundle_dir) as stack, traced_to("http://127.0.0.1:4317", OTEL_EXPORTER_OTLP_PROTOCOL="grpc"):
        gateway: Gateway = stack.start_gateway()
        line = gateway.wait_for("traces cannot be exported")
        assert "otlp_proto_grpc" in line["reason"]
        assert "patchforge[otel]" in line["reason"]
        assert gateway.http.get("/healthz").status_code == 200
