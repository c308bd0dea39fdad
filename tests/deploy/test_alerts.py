"""Each alert fires when it should and not otherwise, tested with Prometheus's own rule tests."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import run

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules" / "patchforge.yml"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian: apt install prometheus)")

GATEWAY = 'up{job="patchforge-gateway",instance="a"}'
WORKER = 'up{job="patchforge-worker",instance="w"}'
LOST = 'patchforge_log_lines_dropped_total{instance="a",process="gateway"}'
STUCK = (
    'patchforge_requests_running{instance="w",model="m"}',
    'patchforge_evaluation_seconds_count{instance="w",model="m"}',
)

RULE = {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]}


@dataclass(frozen=True)
class Case:
    """What Prometheus saw, one value per minute (`0+3x20` counts up by three), and whether the alert then fires."""

    alert: str
    series: dict[str, str]
    fires: bool
    minutes: int = 20
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the alert, besides its name, state and severity."""


def both(alert: str, good: dict[str, str], bad: dict[str, str], *, minutes: int = 20, **labels: str) -> list[Case]:
    return [Case(alert, good, False, minutes), Case(alert, bad, True, minutes, labels)]


def failures(code: str) -> str:
    return f'patchforge_request_failures_total{{model="m",code="{code}"}}'


def ended(status: str) -> str:
    return f'patchforge_requests_total{{model="m",sampler="euler",status="{status}"}}'


def degraded(reason: str) -> str:
    return f'patchforge_requests_degraded_total{{model="m",reason="{reason}"}}'


def jobs(waiting: int, held: int, *, workers: int = 0, model: str = "m") -> dict[str, str]:
    counts = {"requests_waiting": waiting, "requests_held": held, "model_workers": workers}
    return {f'patchforge_{name}{{model="{model}"}}': f"{count}x20" for name, count in counts.items()}


def memory(used: dict[str, int], limit: int = 100) -> dict[str, str]:
    """What queue servers use, by number."""
    return {f'patchforge_queue_memory_bytes{{server="{server}"}}': f"{value}x20" for server, value in used.items()} | {
        f'patchforge_queue_memory_limit_bytes{{server="{server}"}}': f"{limit}x20" for server in used
    }


CASES = [
    *both(
        "PatchforgeNoGateway",
        {GATEWAY: "1x20", GATEWAY.replace('"a"', '"b"'): "0x20"},
        {GATEWAY: "0x20"},
    ),
    Case("PatchforgeNoGateway", {WORKER: "1x20"}, True),
    *both(
        "PatchforgeTargetDown",
        {GATEWAY: "1x20", WORKER: "1x20"},
        {WORKER: "0x20"},
        job="patchforge-worker",
        instance="w",
    ),
    *both(
        "PatchforgeQueueServerAway",
        {
            'patchforge_queue_up{instance="a",server="1"}': "0x20",
            'patchforge_queue_up{instance="b",server="1"}': "1x20",
        },
        {'patchforge_queue_up{server="0"}': "1x20", 'patchforge_queue_up{server="1"}': "0x20"},
        server="1",
    ),
    *both(
        "PatchforgeQueueServerMemory",
        memory({"0": 80, "1": 80}),
        memory({"0": 80, "1": 90}),
        server="1",
    ),
    Case(
        "PatchforgeQueueServerMemory",
        memory({"0": 90}, limit=0),
        False,
    ),
    *both(
        "PatchforgeMemoryRefusals",
        {"patchforge_memory_refusals_total": "5x20"},
        {"patchforge_memory_refusals_total": "0+1x20"},
    ),
    *both("PatchforgeJobsLost", {"patchforge_jobs_lost_total": "5x20"}, {"patchforge_jobs_lost_total": "0x15 2x5"}),
    *both("PatchforgeNoWorkers", {"patchforge_workers": "1x20"}, {"patchforge_workers": "0x20"}),
    Case("PatchforgeNoWorkers", {"patchforge_workers": " ".join(["NaN"] * 20)}, False),
    Case("PatchforgeNoWorkers", {"patchforge_workers": "0x20", 'patchforge_model_asleep{model="m"}': "1x20"}, False),
    Case("PatchforgeNoWorkers", {"patchforge_workers": "0x20", 'patchforge_model_asleep{model="m"}': "0x20"}, True),
    *both(
        "PatchforgeModelWithoutWorker", jobs(3, 1, workers=1) | jobs(0, 0, workers=0, model="n"), jobs(3, 0), model="m"
    ),
    Case("PatchforgeModelWithoutWorker", jobs(0, 4), True, labels={"model": "m"}),
    *both(
        "PatchforgeModelMixed",
        {'patchforge_model_digests{model="m"}': "1x10 2x20 1x60"},
        {
            'patchforge_model_digests{model="m",instance="a"}': "2x60",
            'patchforge_model_digests{model="n",instance="a"}': "1x60",
        },
        model="m",
        minutes=60,
    ),
    *both(
        "PatchforgeQueueOld",
        {'patchforge_queue_oldest_seconds{model="m"}': "59x20"},
        {'patchforge_queue_oldest_seconds{model="m"}': "0+10x20"},
        model="m",
    ),
    *both(
        "PatchforgeQueueNearlyFull",
        {
            'patchforge_requests_waiting{model="m",instance="a"}': "7x20",
            'patchforge_requests_waiting{model="m",instance="b"}': "7x20",
            'patchforge_queue_capacity{instance="a"}': "10x20",
        },
        {
            'patchforge_requests_waiting{model="m",instance="a"}': "5x20",
            'patchforge_requests_waiting{model="n",instance="a"}': "4x20",
            'patchforge_queue_capacity{instance="a"}': "10x20",
        },
    ),
    *both(
        "PatchforgeQualityLowered",
        {degraded("load"): "0+4x20", degraded("time"): "0+9x20", ended("completed"): "0+10x20"},
        {degraded("load"): "0+6x20", ended("completed"): "0+10x20"},
        model="m",
    ),
    *both(
        "PatchforgeErrorRatio",
        {ended("failed"): "0+1x20", ended("completed"): "0+50x20"},
        {ended("failed"): "0+1x20", ended("completed"): "0+10x20"},
        model="m",
    ),
    *both(
        "PatchforgeHttpErrors",
        {
            'patchforge_http_requests_total{status="5xx",route="/readyz"}': "0+60x20",
            'patchforge_http_requests_total{status="2xx",route="/v1/jobs"}': "0+10x20",
        },
        {
            'patchforge_http_requests_total{status="5xx",route="/v1/jobs"}': "0+10x20",
            'patchforge_http_requests_total{status="2xx",route="/v1/jobs"}': "0+90x20",
        },
    ),
    *both(
        "PatchforgeGrpcErrors",
        {
            'patchforge_grpc_requests_total{status="CANCELLED"}': "0+9x20",
            'patchforge_grpc_requests_total{status="OK"}': "0+9x20",
        },
        {
            'patchforge_grpc_requests_total{status="INTERNAL"}': "0+1x20",
            'patchforge_grpc_requests_total{status="OK"}': "0+9x20",
        },
    ),
    *both(
        "PatchforgeDeadLetters",
        {failures("dead_letter"): "3x20", failures("not_finite"): "0+1x20"},
        {failures("dead_letter"): "0x15 1x5"},
        model="m",
    ),
    *both(
        "PatchforgeOutOfMemory",
        {failures("out_of_memory"): "3x20", failures("not_finite"): "0+1x20"},
        {failures("out_of_memory"): "0x15 1x5"},
        model="m",
    ),
    *both(
        "PatchforgeJobsReclaimed",
        {"patchforge_requests_reclaimed_total": "2x20"},
        {"patchforge_requests_reclaimed_total": "0x15 1x5"},
    ),
    *both(
        "PatchforgeObjectStore",
        {'patchforge_results_failures_total{operation="put"}': "7x20"},
        {'patchforge_results_failures_total{operation="put"}': "0x5 0+9x15"},
        operation="put",
    ),
    *both(
        "PatchforgeLogLinesDropped",
        {LOST: "7x20"},
        {LOST: "0x15 3x5"},
        instance="a",
        process="gateway",
    ),
    *both(
        "PatchforgeWorkerStuck",
        dict(zip(STUCK, ("3x20", "0+9x20"), strict=True)),
        dict(zip(STUCK, ("3x20", "5x20"), strict=True)),
        instance="w",
    ),
    Case("PatchforgeWorkerStuck", dict(zip(STUCK, ("0x20", "5x20"), strict=True)), False),
]


def rule_test(case: Case) -> dict[str, Any]:
    """One of promtool's unit tests. It asks for the alert's state by a query, so annotations need not be repeated."""
    firing = f'ALERTS{{alertname="{case.alert}",alertstate="firing"}}'
    labels = {"alertname": case.alert, "alertstate": "firing", **RULE[case.alert]["labels"], **case.labels}
    text = ",".join(f'{name}="{value}"' for name, value in labels.items())
    expected = [{"labels": f"ALERTS{{{text}}}", "value": 1}] if case.fires else []
    return {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
                "promql_expr_test": [{"expr": firing, "eval_time": f"{case.minutes}m", "exp_samples": expected}],
            }
        ],
    }


@needs_promtool
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}-{'fires' if case.fires else 'quiet'}")
def test_alert(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump(rule_test(case)), "utf-8")
    run(str(PROMTOOL), "test", "rules", file)


@needs_promtool
def test_a_wrong_expectation_is_noticed(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.fires)
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump(rule_test(Case(case.alert, case.series, fires=False))), "utf-8")
    assert run(str(PROMTOOL), "test", "rules", file, status=None).returncode != 0


def test_every_alert_has_a_case_of_either_kind() -> None:
    assert {case.alert for case in CASES if case.fires} == {*RULE}
    assert {case.alert for case in CASES if not case.fires} == {*RULE}


@pytest.mark.parametrize("rule", RULE.values(), ids=RULE.keys())
def test_an_alert_says_what_is_wrong_and_what_follows(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert {*rule["annotations"]} == {"summary", "description"}


@needs_promtool
@pytest.mark.parametrize("name", ["prometheus.yml", "kubernetes.yml"])
def test_the_configuration(name: str) -> None:
    checked = run(str(PROMTOOL), "check", "config", RULES.parents[1] / name)
    assert f"{len(RULE)} rules found" in checked.stdout
