"""Metrics say what a worker saved, grow no series on their own, and merge into one valid exposition."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import GatewayMetrics, WorkerMetrics, merge_expositions
from service.schemas import DualLoop, GenerationRequest, Job, JobError, JobStatus, SavingsReport

REPORT = SavingsReport(
    patches=64,
    patch_evaluations=600,
    dense_patch_evaluations=1000,
    savings_ratio=0.4,
    queue_seconds=0.1,
    duration_seconds=1.5,
    time_to_first_preview_seconds=0.2,
    images=[],
)


def a_job(status: JobStatus = JobStatus.RUNNING, error: JobError | None = None) -> Job:
    request = GenerationRequest(model="emoji", prompt="a cat", sampler=DualLoop(), seed=1, steps=4, guidance=2.0)
    return Job(id="0" * 26, status=status, request=request, created_at=0.0, error=error)


def samples(text: bytes) -> dict[str, float]:
    """Value by ``name{label="value",…}``; refuses what Prometheus would."""
    found: dict[str, float] = {}
    names: set[str] = set()
    for family in text_string_to_metric_families(text.decode()):
        assert family.name not in names, "a family appears twice"
        assert family.documentation
        names.add(family.name)
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}"
            assert key not in found, "a series appears twice"
            found[key] = sample.value
    return found


OF_REQUEST = '{model="emoji",sampler="dual_loop"}'


def a_busy_worker() -> WorkerMetrics:
    metrics = WorkerMetrics(CollectorRegistry())
    for _ in range(2):
        metrics.request_started(a_job())
    metrics.request_finished(a_job(), REPORT, JobStatus.COMPLETED)
    metrics.evaluated("emoji", 100)
    return metrics


def test_a_completed_request_shows_what_it_saved() -> None:
    seen = samples(a_busy_worker().exposition())
    assert seen[f"patchforge_patch_evaluations_total{OF_REQUEST}"] == 600
    assert seen[f"patchforge_patch_evaluations_saved_total{OF_REQUEST}"] == 400
    assert seen[f"patchforge_request_step_savings_ratio_sum{OF_REQUEST}"] == 0.4
    assert seen[f"patchforge_request_queue_seconds_count{OF_REQUEST}"] == 1
    assert seen[f"patchforge_request_duration_seconds_sum{OF_REQUEST}"] == 1.5
    assert seen[f"patchforge_time_to_first_preview_seconds_sum{OF_REQUEST}"] == 0.2
    assert seen[f"patchforge_requests_running{OF_REQUEST}"] == 1
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="completed"}'] == 1
    assert seen['patchforge_evaluation_patches_bucket{le="128.0",model="emoji"}'] == 1
    assert seen['patchforge_evaluation_patches_bucket{le="64.0",model="emoji"}'] == 0


def test_a_request_that_did_not_complete_counts_no_work() -> None:
    metrics = WorkerMetrics(CollectorRegistry())
    metrics.request_started(a_job())
    metrics.request_finished(a_job(), None, JobStatus.FAILED)
    metrics.request_started(a_job())
    metrics.request_released(a_job())
    metrics.request_started(a_job())
    metrics.request_lost(a_job())
    seen = samples(metrics.exposition())
    assert seen[f"patchforge_requests_running{OF_REQUEST}"] == 0
    assert seen[f"patchforge_claims_lost_total{OF_REQUEST}"] == 1
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="failed"}'] == 1
    assert not any("savings" in name for name in seen)


def test_dead_letters_are_counted_apart() -> None:
    metrics = WorkerMetrics(CollectorRegistry())
    metrics.request_ended_in_queue(a_job(JobStatus.FAILED, JobError(code="dead_letter", message="…")))
    metrics.request_ended_in_queue(a_job(JobStatus.EXPIRED))
    seen = samples(metrics.exposition())
    assert seen[f"patchforge_requests_dead_lettered_total{OF_REQUEST}"] == 1
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="failed"}'] == 1
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="expired"}'] == 1


def test_strangers_add_no_series() -> None:
    metrics = GatewayMetrics(CollectorRegistry())
    metrics.http_answered("GET", None, 404, 0.1)
    metrics.http_answered("BREW", None, 405, 0.1)
    metrics.rpc_answered(None, "UNIMPLEMENTED", 0.1)
    before = samples(metrics.exposition()).keys()
    for number in range(1000):
        metrics.http_answered(f"BREW{number}", None, 400 + number % 100, 0.1)
        metrics.rpc_answered(None, "UNIMPLEMENTED", 0.1)
    assert samples(metrics.exposition()).keys() == before


def test_waiting_forgets_models_that_are_gone() -> None:
    metrics = GatewayMetrics(CollectorRegistry())
    metrics.requests_waiting({"emoji": 3, "digits": 1})
    metrics.requests_waiting({"emoji": 0})
    waiting = {name: value for name, value in samples(metrics.exposition()).items() if "waiting" in name}
    assert waiting == {'patchforge_requests_waiting{model="emoji"}': 0}


def test_one_exposition_is_merged_to_itself() -> None:
    text = a_busy_worker().exposition()
    assert merge_expositions([text]) == text


def test_several_workers_are_summed() -> None:
    one = samples(a_busy_worker().exposition())
    both = samples(merge_expositions([a_busy_worker().exposition(), a_busy_worker().exposition()]))
    kept = {name: value for name, value in one.items() if "_created" not in name}
    assert both == pytest.approx({name: 2 * value for name, value in kept.items()})


def test_the_gateway_shows_its_workers_too() -> None:
    gateway = GatewayMetrics(CollectorRegistry())
    gateway.requests_waiting({"emoji": 2})
    gateway.request_ended_in_queue(a_job(JobStatus.CANCELLED))
    gateway.http_answered("POST", "/v1/generations", 202, 0.01)
    idle = WorkerMetrics(CollectorRegistry())
    text = gateway.exposition([a_busy_worker().exposition(), idle.exposition()])
    seen = samples(text)
    assert seen['patchforge_requests_waiting{model="emoji"}'] == 2
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="cancelled"}'] == 1
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="completed"}'] == 1
    assert seen[f"patchforge_request_step_savings_ratio_count{OF_REQUEST}"] == 1
    assert seen['patchforge_http_requests_total{method="POST",route="/v1/generations",status="2xx"}'] == 1
    assert b"# TYPE patchforge_patch_evaluations_total counter" in text
    assert b"# TYPE patchforge_request_step_savings_ratio histogram" in text


def test_label_values_keep_their_quotes() -> None:
    gateway = GatewayMetrics(CollectorRegistry())
    gateway.requests_waiting({'a"b\\c\n': 1})
    twice = merge_expositions([gateway.exposition(), gateway.exposition()])
    assert next(iter(text_string_to_metric_families(twice.decode()))).samples[0].labels == {"model": 'a"b\\c\n'}


def test_what_is_no_exposition_is_refused() -> None:
    with pytest.raises(ValueError, match=r".*"):
        merge_expositions([b"{{{", b"x 1\n"])
