"""Every PromQL query that we ship: in the dashboard's panels and variables, the alerts, and the autoscaler."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "patchforge.json"
RULES = ROOT / "deploy" / "prometheus" / "rules" / "patchforge.yml"
SCALING = sorted((ROOT / "deploy" / "kubernetes" / "components" / "keda").glob("*/scaled-object.yml"))


@dataclass(frozen=True)
class Query:
    """A query with its dashboard variables filled in, and its place."""

    where: str
    text: str

    @property
    def ast(self) -> Any:
        return promql_parser.parse(self.text)


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text("utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]


def filled_in(text: str) -> str:
    """Returns the query as Grafana sends it if every variable is All."""
    for name, value in (("$__rate_interval", "1m"), ("$__range", "1h"), ("$model", ".*"), ("$sampler", ".*")):
        text = text.replace(name, value)
    return text


def of_panels() -> list[Query]:
    return [
        Query(f"panel {panel['title']}", filled_in(target["expr"]))
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]


def of_variables() -> list[Query]:
    """`label_values(metric, label)` asks for the series of the metric that have the label."""
    found = []
    for variable in dashboard()["templating"]["list"]:
        match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
        assert match is not None
        found.append(Query(f"variable {variable['name']}", f'{match[1]}{{{match[2]}=~".+"}}'))
    return found


def of_alerts() -> list[Query]:
    return [Query(f"alert {rule['alert']}", rule["expr"]) for rule in rules()]


def of_scaling() -> list[Query]:
    """One query for each target."""
    found = []
    for path in SCALING:
        spec = yaml.safe_load(path.read_text("utf-8"))["spec"]
        [trigger] = spec["triggers"]
        found.append(Query(f"autoscaler of {spec['scaleTargetRef']['name']}", trigger["metadata"]["query"]))
    return found


def every_query() -> list[Query]:
    return [*of_panels(), *of_variables(), *of_alerts(), *of_scaling()]


def nodes(tree: Any) -> list[Any]:
    """Yields the parts of a parsed query, beginning with itself."""
    found: list[Any] = []
    promql_parser.walk(tree, found.append)
    return found


def selectors(tree: Any) -> list[Any]:
    return [node for node in nodes(tree) if isinstance(node, promql_parser.VectorSelector)]


def labels_relied_on(tree: Any) -> Iterator[tuple[Any, str]]:
    """Returns (selector, label) for every label that the query matches, groups or joins by."""
    for selector in selectors(tree):
        for matcher in selector.matchers.matchers:
            yield selector, matcher.name
    for node in nodes(tree):
        modifier = getattr(node, "modifier", None)
        if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
            yield from ((selector, label) for selector in selectors(node.expr) for label in modifier.labels)
        elif isinstance(node, promql_parser.BinaryExpr) and modifier is not None and modifier.matching is not None:
            yield from ((selector, label) for selector in selectors(node) for label in modifier.matching.labels)
