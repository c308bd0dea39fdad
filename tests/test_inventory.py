"""Nothing that users rely on gets lost: commands, options, settings, metrics, endpoints, gRPC methods.

`python -m tests.test_inventory` adds what is new to tests/inventory.json. It removes nothing: that is done by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client import CollectorRegistry

from patchforge.service.cli.main import app
from patchforge.service.gateway.app import create_app
from patchforge.service.gateway.auth import ApiKeys
from patchforge.service.gateway.metrics import GatewayMetrics
from patchforge.service.pb.inference import grpc_inference_service_pb2
from patchforge.service.pb.patchforge.v1 import image_service_pb2
from patchforge.service.settings import Settings
from tests.deploy.test_metrics_docs import registries

INVENTORY = Path(__file__).parent / "inventory.json"


def commands() -> Iterator[str]:
    """Returns each command, followed by its options and arguments."""
    yield from _commands(typer.main.get_command(app), "")


def _commands(command: Any, name: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for word, each in command.commands.items():
            yield from _commands(each, f"{name} {word}".strip())
        return
    yield name
    for parameter in command.params:
        if parameter.param_type_name == "option":
            yield from (f"{name} {option}" for option in (*parameter.opts, *parameter.secondary_opts))
        else:
            yield f"{name} {parameter.name.upper()}"


def settings() -> Iterator[str]:
    return (f"PATCHFORGE_{name.upper()}" for name in Settings.model_fields)


def metrics() -> Iterator[str]:
    """Returns metrics with their kinds."""
    for _, registry in registries():
        yield from (f"{each.name} {each.type}" for each in registry.collect() if each.name.startswith("patchforge_"))


def endpoints() -> Iterator[str]:
    """Returns the endpoints of the API document, and the pages that are not in it."""
    service: Any = None  # used only when a request comes
    http = create_app(Settings(), service, GatewayMetrics(CollectorRegistry(), 1), ApiKeys([]))
    for path, operations in http.openapi()["paths"].items():
        yield from (f"{method.upper()} {path}" for method in operations)
    pages = [
        route for route in http.routes if hasattr(route, "path") and not getattr(route, "include_in_schema", False)
    ]
    yield from (f"page {page.path}" for page in pages)


def rpc_methods() -> Iterator[str]:
    for module in (image_service_pb2, grpc_inference_service_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from (f"/{service.full_name}/{method.name}" for method in service.methods)


KINDS: dict[str, Callable[[], Iterable[str]]] = {
    "commands": commands,
    "settings": settings,
    "metrics": metrics,
    "endpoints": endpoints,
    "rpc_methods": rpc_methods,
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(kind: str) -> None:
    recorded = json.loads(INVENTORY.read_text("utf-8"))[kind]
    assert len(recorded) > 5
    assert not set(recorded) - set(KINDS[kind]())


if __name__ == "__main__":
    known = json.loads(INVENTORY.read_text("utf-8")) if INVENTORY.exists() else {}
    merged = {kind: sorted({*known.get(kind, ()), *today()}) for kind, today in KINDS.items()}
    INVENTORY.write_text(json.dumps(merged, indent=1) + "\n", "utf-8")
