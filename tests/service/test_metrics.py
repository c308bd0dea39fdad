"""Metrics say what a worker saved, gain no series by themselves, and merge into one valid exposition."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.expositions import merge_expositions
from patchforge.service.gateway.metrics import GatewayMetrics, QueueState, ServerState
from patchforge.service.messages.samplers import DualLoop
from patchforge.service.messages.schemas import GenerationRequest, Job, JobError, JobStatus
from patchforge.service.queue.connection import Memory
from patchforge.service.worker.metrics import FAILURE_CODES, WorkerMetrics
from tests.service.queue import kit

REPORT = kit.REPORT.model_copy(update={"duration_seconds": 1.5})


def a_job(status: JobStatus = JobStatus.RUNNING, error: JobError | None = None) -> Job:
    request = GenerationRequest(model="emoji", prompt="a cat", sampler=DualLoop(), seed=1, steps=4, guidance=2.0)
    return Job(id="0" * 26, status=status, request=request, created_at=0.0, error=error)


def samples(text: bytes) -> dict[str, float]:
    """Returns `name{label="value",…}` → value, and refuses what Prometheus would refuse."""
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


def a_worker() -> WorkerMetrics:
    """Metrics of a worker whose only model needs 1,000 FLOPs per patch."""
    return WorkerMetrics(CollectorRegistry(), patch_budgets={"emoji": 400}, patch_flops={"emoji": 1000})


def a_gateway() -> GatewayMetrics:
    return GatewayMetrics(CollectorRegistry(), max_waiting=8)


def split_at(text: str) -> tuple[str, str, str]:
    return text.partition("@")


def a_queue(*workers: list[str], **waiting: int) -> QueueState:
    """Each worker as the models that it serves, as `name` or `name@digest`."""
    bundles = [[(name, digest or None) for name, _, digest in map(split_at, models)] for models in workers]
    return QueueState(
        waiting,
        {},
        dict.fromkeys(waiting, 12.5),
        bundles,
        asleep=[],
        batches={"in_progress": 2},
        servers=[ServerState(Memory(used=10, limit=100, reserved=20, admission_limit=90), 2, 5)],
    )


OF_REQUEST = '{model="emoji",sampler="dual_loop"}'


def a_busy_worker() -> WorkerMetrics:
    metrics = a_worker()
    for _ in range(2):
        metrics.request_started(a_job())
    metrics.request_finished(a_job(), REPORT, JobStatus.COMPLETED)
    metrics.evaluated("emoji", 100, 0.02)
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
    assert seen['patchforge_evaluation_fill_ratio_sum{model="emoji"}'] == 0.25
    assert seen['patchforge_evaluation_seconds_sum{model="emoji"}'] == 0.02
    assert seen[f"patchforge_flops_total{OF_REQUEST}"] == 600_000
    assert seen[f"patchforge_flops_saved_total{OF_REQUEST}"] == 400_000


def test_a_request_that_did_not_complete_counts_no_work() -> None:
    metrics = a_worker()
    metrics.request_started(a_job())
    metrics.request_finished(a_job(), None, JobStatus.FAILED, "out_of_memory")
    metrics.request_started(a_job())
    metrics.request_released(a_job())
    metrics.request_started(a_job())
    metrics.request_lost(a_job())
    seen = samples(metrics.exposition())
    assert seen[f"patchforge_requests_running{OF_REQUEST}"] == 0
    assert seen[f"patchforge_claims_lost_total{OF_REQUEST}"] == 1
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="failed"}'] == 1
    assert seen['patchforge_request_failures_total{code="out_of_memory",model="emoji"}'] == 1
    assert not any("savings" in name for name in seen)


def test_what_alerts_look_at_is_there_before_it_happens_and_odd_codes_add_nothing() -> None:
    metrics = a_worker()
    before = samples(metrics.exposition())
    assert all(
        before[f'patchforge_request_failures_total{{code="{code}",model="emoji"}}'] == 0 for code in FAILURE_CODES
    )
    assert before[f"patchforge_requests_reclaimed_total{OF_REQUEST}"] == 0
    metrics.request_started(a_job())
    metrics.request_finished(a_job(), None, JobStatus.FAILED, "made_up")
    after = samples(metrics.exposition())
    assert after['patchforge_request_failures_total{code="other",model="emoji"}'] == 1
    assert {name for name in after if "failures_total" in name} == {name for name in before if "failures_total" in name}


def test_every_code_a_job_can_fail_with_is_listed() -> None:
    """Collects every string that worker, queue and messages use as `code`."""
    found = {InvalidRequest.code}
    for path in [file for room in ("worker", "queue", "messages") for file in Path("service", room).glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            given = isinstance(node, ast.keyword) and node.arg in ("code", "otherwise")
            if given or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "code"):
                found |= strings(node.value)
            elif isinstance(node, ast.FunctionDef) and node.name == "job_error":
                found |= set().union(*map(strings, node.args.defaults))
    assert found == {*FAILURE_CODES} - {"other"}


def strings(node: ast.AST) -> set[str]:
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def test_dead_letters_are_counted_apart() -> None:
    metrics = a_worker()
    metrics.request_ended_in_queue(a_job(JobStatus.FAILED, JobError(code="dead_letter", message="…")))
    metrics.request_ended_in_queue(a_job(JobStatus.EXPIRED))
    seen = samples(metrics.exposition())
    assert seen[f"patchforge_requests_dead_lettered_total{OF_REQUEST}"] == 1
    assert seen['patchforge_request_failures_total{code="dead_letter",model="emoji"}'] == 1
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="failed"}'] == 1
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="expired"}'] == 1


def test_strangers_add_no_series() -> None:
    metrics = a_gateway()
    metrics.record_http_response("GET", None, 404, 0.1)
    metrics.record_http_response("BREW", None, 405, 0.1)
    before = samples(metrics.exposition()).keys()
    for number in range(1000):
        metrics.record_http_response(f"BREW{number}", None, 400 + number % 100, 0.1)
    assert samples(metrics.exposition()).keys() == before


def test_models_that_are_gone_are_forgotten() -> None:
    metrics = a_gateway()
    metrics.set_queue_state(a_queue(["emoji", "digits"], emoji=3, digits=1))
    metrics.set_queue_state(a_queue(["emoji"], ["emoji"]))
    seen = samples(metrics.exposition())
    assert {name: value for name, value in seen.items() if "{model=" in name} == {
        'patchforge_requests_waiting{model="emoji"}': 0,
        'patchforge_queue_oldest_seconds{model="emoji"}': 0,
        'patchforge_model_workers{model="emoji"}': 2,
        'patchforge_model_digests{model="emoji"}': 0,
        'patchforge_requests_held{model="emoji"}': 0,
        'patchforge_model_asleep{model="emoji"}': 0,
    }
    assert seen["patchforge_workers{}"] == 2


def test_a_model_no_worker_serves_any_more_still_shows_what_waits() -> None:
    metrics = a_gateway()
    metrics.set_queue_state(a_queue(emoji=3))
    seen = samples(metrics.exposition())
    assert seen['patchforge_requests_waiting{model="emoji"}'] == 3
    assert seen['patchforge_queue_oldest_seconds{model="emoji"}'] == 12.5
    assert seen['patchforge_model_workers{model="emoji"}'] == 0
    assert seen["patchforge_workers{}"] == 0


def test_nothing_is_claimed_of_a_queue_that_is_away() -> None:
    metrics = a_gateway()
    metrics.set_queue_state(a_queue(["emoji"], emoji=3))
    assert samples(metrics.exposition())['patchforge_queue_up{server="0"}'] == 1
    metrics.set_queue_state(None)
    seen = samples(metrics.exposition())
    assert seen['patchforge_queue_up{server="0"}'] == 0
    assert seen["patchforge_queue_capacity{}"] == 8
    assert math.isnan(seen["patchforge_workers{}"])
    assert math.isnan(seen['patchforge_queue_memory_bytes{server="0"}'])
    assert not any("waiting" in name for name in seen)


def test_one_exposition_is_merged_to_itself() -> None:
    text = a_busy_worker().exposition()
    assert merge_expositions([text]) == text


def test_several_workers_are_summed() -> None:
    one = samples(a_busy_worker().exposition())
    both = samples(merge_expositions([a_busy_worker().exposition(), a_busy_worker().exposition()]))
    kept = {name: value for name, value in one.items() if "_created" not in name}
    assert both == pytest.approx({name: 2 * value for name, value in kept.items()})


def test_the_gateway_shows_its_workers_too() -> None:
    gateway = a_gateway()
    gateway.set_queue_state(a_queue(["emoji"], emoji=2))
    gateway.count_request_ended_in_queue(a_job(JobStatus.CANCELLED))
    gateway.record_http_response("POST", "/v1/generations", 202, 0.01)
    idle = a_worker()
    text = gateway.exposition([a_busy_worker().exposition(), idle.exposition()])
    seen = samples(text)
    assert seen['patchforge_requests_waiting{model="emoji"}'] == 2
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="cancelled"}'] == 1
    assert seen['patchforge_requests_total{model="emoji",sampler="dual_loop",status="completed"}'] == 1
    assert seen[f"patchforge_request_step_savings_ratio_count{OF_REQUEST}"] == 1
    assert seen['patchforge_http_requests_total{method="POST",route="/v1/generations",status="2xx"}'] == 1
    assert b"# TYPE patchforge_patch_evaluations_total counter" in text
    assert b"# TYPE patchforge_request_step_savings_ratio histogram" in text


def test_the_bundles_behind_a_name_are_counted_once_each() -> None:
    gateway = a_gateway()
    gateway.set_queue_state(a_queue(["emoji@a", "digits@x"], ["emoji@b", "digits@x"], ["emoji@a"], ["old"], mute=1))
    seen = samples(gateway.exposition())
    found = {
        model: seen[f'patchforge_model_digests{{model="{model}"}}'] for model in ("emoji", "digits", "old", "mute")
    }
    assert found == {"emoji": 2, "digits": 1, "old": 0, "mute": 0}


def test_models_without_workers_are_shown_while_they_have_jobs_or_are_asleep() -> None:
    gateway = a_gateway()
    gateway.set_queue_state(replace(a_queue(), held={"dead": 4}, asleep=["asleep"]))
    seen = samples(gateway.exposition())
    for model, held, asleep in (("dead", 4, 0), ("asleep", 0, 1)):
        assert seen[f'patchforge_requests_held{{model="{model}"}}'] == held
        assert seen[f'patchforge_model_asleep{{model="{model}"}}'] == asleep
        assert seen[f'patchforge_requests_waiting{{model="{model}"}}'] == 0
        assert seen[f'patchforge_model_workers{{model="{model}"}}'] == 0


def test_label_values_keep_their_quotes() -> None:
    gateway = a_gateway()
    gateway.set_queue_state(a_queue(['a"b\\c\n']))
    twice = merge_expositions([gateway.exposition(), gateway.exposition()])
    families = text_string_to_metric_families(twice.decode())
    labels = [sample.labels for family in families for sample in family.samples if "model" in sample.labels]
    assert labels == [{"model": 'a"b\\c\n'}] * 6


@pytest.mark.parametrize("garbage", [b"{{{", b"\xff\xfe", b"x{", b'x{a="'])
def test_what_is_no_exposition_is_left_out(garbage: bytes) -> None:
    gateway = a_gateway().exposition()
    kept = {name: value for name, value in samples(gateway).items() if "_created" not in name}
    assert samples(merge_expositions([gateway, garbage])) == kept


@pytest.mark.parametrize(
    "odd",
    [
        b'# HELP x_total .\n# TYPE x_total counter\nx_total{a="b} 5\n',
        b"# HELP x_total .\n# TYPE x_total counter\nx_total 5\nx_total 5\n",
    ],
)
def test_a_text_that_only_looks_right_does_not_hide_the_others(odd: bytes) -> None:
    good = b"# HELP patchforge_a_total .\n# TYPE patchforge_a_total counter\npatchforge_a_total 2.0\n"
    merged = samples(merge_expositions([good, odd, good]))
    assert merged["patchforge_a_total{}"] == 4.0


def test_the_order_of_labels_does_not_matter() -> None:
    texts = [
        b'# HELP x_total .\n# TYPE x_total counter\nx_total{a="1",b="2"} 1.0\n',
        b'# HELP x_total .\n# TYPE x_total counter\nx_total{b="2",a="1"} 2.0\n',
    ]
    assert list(samples(merge_expositions(texts)).values()) == [3.0]
