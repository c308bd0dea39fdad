"""Every query of dashboard, alerts and autoscaler asks for what a live server exposes, and Prometheus answers it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from patchforge.service.messages.schemas import JobStatus
from patchforge.service.worker.metrics import FAILURE_CODES, LOWERED_BY, MET
from tests.deploy.conftest import Live
from tests.deploy.prometheus import ask, running_prometheus
from tests.deploy.queries import Query, every_query, labels_relied_on, of_panels, of_variables, selectors
from tests.processes import eventually

QUERIES = every_query()
SHIPPED_MODELS = {"emoji-class", "emoji-text"}
CLOSED = {
    ("patchforge_requests_total", "status"): {status.value for status in JobStatus if status.terminal},
    ("patchforge_request_failures_total", "code"): {*FAILURE_CODES},
    ("patchforge_requests_degraded_total", "reason"): {*LOWERED_BY},
    ("patchforge_requests_in_time_total", "met"): {*MET},
    ("patchforge_http_requests_total", "status"): {f"{first}xx" for first in range(1, 6)},
    ("patchforge_requests_waiting", "model"): SHIPPED_MODELS,
    ("patchforge_requests_held", "model"): SHIPPED_MODELS,
    ("up", "job"): {"patchforge-gateway", "patchforge-worker"},
    ("process_resident_memory_bytes", "job"): {"patchforge-gateway", "patchforge-worker"},
}


def unknown(query: Query, exposed: dict[str, set[str]]) -> list[str]:
    """Series that queries use and no server exposes."""
    tree = query.ast
    found = [selector.name for selector in selectors(tree) if selector.name not in exposed]
    found += [
        f"{selector.name}{{{label}}}"
        for selector, label in labels_relied_on(tree)
        if label not in exposed.get(selector.name, set())
    ]
    return found


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_metrics_and_labels_exist(query: Query, exposed: dict[str, set[str]]) -> None:
    assert selectors(query.ast)
    assert unknown(query, exposed) == []


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_a_value_asked_for_is_one_that_can_be(query: Query) -> None:
    for selector in selectors(query.ast):
        for matcher in selector.matchers.matchers:
            if matcher.op is promql_parser.MatchOp.Equal:
                assert matcher.value in CLOSED[selector.name, matcher.name]


def test_what_does_not_exist_is_noticed(exposed: dict[str, set[str]]) -> None:
    for wrong in ("patchforge_nothing", 'patchforge_workers{model="m"}', "sum by (sampler) (patchforge_model_workers)"):
        assert unknown(Query("", wrong), exposed)
    assert unknown(Query("", "sum(rate(patchforge_flops_total[5m]))"), exposed) == []


def test_every_metric_of_ours_is_on_the_dashboard_or_watched(exposed: dict[str, set[str]]) -> None:
    """Except for those that exist for other uses."""
    asked = {selector.name for query in QUERIES for selector in selectors(query.ast)}
    families = {name.removesuffix(end) for name in asked for end in ("_bucket", "_sum", "_count", "")}
    ours = {name for name in exposed if name.startswith("patchforge_") and not name.endswith("_created")}
    unseen = {
        name for name in ours if not {name, *(name.removesuffix(e) for e in ("_bucket", "_sum", "_count"))} & families
    }
    assert unseen == {"patchforge_worker_process_open_fds"}


@pytest.fixture(scope="module")
def prometheus(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A real Prometheus that scrapes the live processes."""
    addresses = {"patchforge-gateway": live.gateway.url, "patchforge-worker": live.worker_metrics}
    targets = {job: [url.removeprefix("http://").removesuffix("/metrics")] for job, url in addresses.items()}
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), targets, seconds=2) as client:
        live.traffic()
        yield client


@pytest.mark.parametrize("query", [*of_panels(), *of_variables()], ids=lambda query: query.where)
def test_prometheus_has_something_to_show(query: Query, prometheus: httpx.Client) -> None:
    if "gpu" in query.text or query.where == "panel Failures by code":  # there is none
        assert ask(prometheus, query.text) == []
    else:
        eventually(lambda: ask(prometheus, query.text), query.text)


def test_prometheus_evaluates_the_alerts_and_none_fires(prometheus: httpx.Client) -> None:
    def evaluated() -> list[dict[str, Any]]:
        groups = prometheus.get("/rules").json()["data"]["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    alerts = eventually(evaluated, "the alerts to be evaluated")
    assert {rule["health"] for rule in alerts} == {"ok"}
    assert [rule["name"] for rule in alerts if rule["state"] == "firing"] == []  # a slow machine's may be pending


def test_nothing_is_counted_twice(live: Live, prometheus: httpx.Client) -> None:
    """The gateway's view of its workers equals theirs, and is left out if workers are scraped themselves."""
    query = "sum(patchforge_patch_evaluations_total)"

    def same() -> bool:
        families = text_string_to_metric_families(live.gateway.http.get("/metrics", params={"workers": "true"}).text)
        samples = [sample for family in families for sample in family.samples]
        counted = sum(sample.value for sample in samples if sample.name == "patchforge_patch_evaluations_total")
        return float(ask(prometheus, query)[0]["value"][1]) == counted > 0

    eventually(same, "Prometheus and gateway to agree")
