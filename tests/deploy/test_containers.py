"""Dockerfile and docker-compose.yml: checked with hadolint and Compose itself, and compared with the code."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry import environment_variables as api_variables
from opentelemetry.sdk import environment_variables as sdk_variables

from patchforge.service.redis_url import RedisUrl
from patchforge.service.settings import Settings
from patchforge.service.tracing import exporters_wanted
from tests.processes import run

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent
KEY = "name:" + "0" * 64
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """docker-compose.yml as Compose itself reads it, including optional services."""
    return composed("--profile", "gpu", "--profile", "tracing")


def composed(*options: str) -> dict[str, Any]:
    ours = {name: value for name, value in os.environ.items() if name.startswith("PATCHFORGE_")}
    command = TOOLS / "docker-compose", *options, "config", "--format", "json"
    return json.loads(run(*command, **ours).stdout)["services"]


def settings_of(environment: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Returns the environment that a service reads. Every name must be a setting or one of OpenTelemetry's."""
    known = {f"PATCHFORGE_{name.upper()}" for name in Settings.model_fields}
    assert {*environment} <= known | {*vars(api_variables), *vars(sdk_variables)}
    for name, value in environment.items():
        if value is not None:  # otherwise it is passed on from outside
            monkeypatch.setenv(name, value)
    return Settings()


def test_hadolint_has_nothing_to_say() -> None:
    assert run(TOOLS / "hadolint", "Dockerfile").stdout == ""


def test_hadolint_would() -> None:
    assert "DL3007" in run(TOOLS / "hadolint", "-", text="FROM debian:latest\nRUN cd /tmp\n", status=None).stdout


@pytest.mark.parametrize("path", ["deploy", "docker-compose.yml"])
def test_yamllint_has_nothing_to_say(path: str) -> None:
    assert run(TOOLS / "yamllint", "--strict", path).stdout == ""


def stages() -> dict[str, str]:
    """Returns the text of each stage of the Dockerfile, by name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {name: f"FROM {source}\n{text}" for source, name, text in zip(*[iter(parts)] * 3, strict=True)}


def test_no_torch_in_the_gateway_and_no_root_anywhere() -> None:
    built = stages()
    assert "torch" not in built["gateway-env"] + built["gateway"]
    assert "torch==" not in (ROOT / "requirements-gateway.lock").read_text("utf-8")
    for name in ("gateway", "worker-base"):
        assert "\nUSER 10001:10001\n" in built[name]
        assert "\nHEALTHCHECK " in built[name]
    for name in ("worker", "worker-cuda"):
        assert built[name].startswith("FROM worker-base\n")


def test_every_image_starts_from_one_base_which_an_argument_replaces() -> None:
    assert {text.split("\n")[0].removeprefix("FROM ") for text in stages().values()} <= {"${BASE}", *stages()}
    assert re.search(r"(?m)^ARG BASE=docker\.io/library/python:3\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", DOCKERFILE)


def test_the_base_needs_python_and_venv_but_no_pip_of_its_own() -> None:
    for name, text in stages().items():
        for line in re.findall(r"(?m)^RUN .*", text):
            assert not re.search(r"\bpython\b", line), "Debian only has python3"
            if re.search(r"(?<!/bin/)\bpip (install|wheel)", line):
                assert "\nENV PATH=/opt/patchforge/bin:" in text.partition(line)[0], f"{name}: {line}"


def test_the_images_run_what_was_tested() -> None:
    torch = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert torch is not None
    assert {*re.findall(r"^ARG TORCH=(.+)$", DOCKERFILE, re.MULTILINE)} == {torch[1]}


def test_every_variable_of_the_images_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = dict(re.findall(r"(PATCHFORGE_\w+)=(\S+)", DOCKERFILE))
    settings = settings_of(variables, monkeypatch)
    assert settings.host == "0.0.0.0"
    assert settings.worker_metrics_port == 9100
    assert f"EXPOSE {settings.http_port} {settings.grpc_port}\n" in DOCKERFILE


def test_what_the_build_copies_is_there_and_reaches_it() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    for name in allowed:
        assert (ROOT / name).exists()
    copied = re.findall(r"^COPY (?!--)(\S+)", DOCKERFILE, re.MULTILINE)
    assert len(copied) >= 4
    assert "." in copied  # the wheel's build needs all files
    assert {"MANIFEST.in", "model", "patchforge", "proto", "pyproject.toml", "service", "setup.py"} <= {*allowed}
    assert all(name == "." or name.partition("/")[0] in allowed for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {*project["license-files"], project["readme"]} <= {*allowed}


@pytest.mark.parametrize("name", ["gateway", "worker", "worker-gpu"])
def test_a_service_of_compose(services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = services[name]
    settings = settings_of(service["environment"], monkeypatch)
    assert service["stop_grace_period"] == f"{settings.stop_seconds}s"
    assert settings.redis_url == "redis://queue:6379/0"
    assert service["build"]["target"] in stages()
    assert service["read_only"]
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    if name != "gateway":
        assert service["networks"]["default"]["aliases"] == ["workers"]
        assert settings.worker_metrics_port == 9100


def test_image_tags_are_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    files = [ROOT / "docker-compose.yml", *(ROOT / "deploy").rglob("*.y*ml"), *(ROOT / "docs").glob("*.md")]
    tag = re.compile(r"(?:image: |-t )patchforge-[a-z-]+:(\S+)|newTag: \"([^\"]+)\"")
    tags = [found[1] or found[2] for path in files for found in tag.finditer(path.read_text("utf-8"))]
    assert len(tags) >= 8
    assert {*tags} == {version}


def test_compose_opens_ports_on_loopback_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert {port["target"] for port in services["gateway"]["ports"]} == {8000, 50051}


def test_compose_starts_gpus_and_a_home_for_traces_only_when_asked(services: dict[str, Any]) -> None:
    assert {*services} - {*composed()} == {"worker-gpu", "jaeger"}


def test_compose_passes_on_where_traces_go_and_without_that_there_are_none(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gateway", "worker", "worker-gpu"):
        set_here = {key: value for key, value in services[name]["environment"].items() if value is not None}
        assert exporters_wanted(set_here) == []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://jaeger:4318")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    for name in ("gateway", "worker"):
        environment = composed()[name]["environment"]
        assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://jaeger:4318"
        assert environment["OTEL_TRACES_SAMPLER"] == "traceidratio"


def test_compose_passes_on_api_keys_and_a_file_of_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATCHFORGE_API_KEYS", KEY)
    assert composed()["gateway"]["environment"]["PATCHFORGE_API_KEYS"] == KEY

    monkeypatch.delenv("PATCHFORGE_API_KEYS")
    (tmp_path / "deploy").mkdir()
    for name in ("docker-compose.yml", "deploy/compose.env"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".env.patchforge").write_text(
        f"PATCHFORGE_API_KEYS={KEY}\nPATCHFORGE_RATE_LIMIT=7\nPATCHFORGE_REDIS_URL=redis://elsewhere\n", "utf-8"
    )
    for name in ("gateway", "worker", "worker-gpu"):
        service = composed("-f", str(tmp_path / "docker-compose.yml"), "--profile", "gpu")[name]
        settings = settings_of(service["environment"], monkeypatch)
        assert settings.api_keys == [KEY]
        assert settings.rate_limit == 7
        assert settings.redis_url == "redis://queue:6379/0"


def test_compose_with_tls_mounts_it_and_probes_by_https(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = composed("-f", "docker-compose.yml", "-f", "deploy/compose.tls.yml")["gateway"]
    settings = settings_of(gateway["environment"], monkeypatch)
    [mount] = gateway["volumes"]
    assert mount["source"] == str(ROOT / "tls")
    for path in (settings.tls_cert, settings.tls_key):
        assert path is not None
        assert str(path.parent) == mount["target"]
    assert f"https://127.0.0.1:{settings.http_port}/healthz" in gateway["healthcheck"]["test"][-1]


def test_a_replicated_queue_server_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    together = composed("-f", "docker-compose.yml", "-f", "deploy/compose.sentinel.yml")
    sentinels = sorted(name for name in together if name.startswith("sentinel-"))
    for name in ("gateway", "worker"):
        url = settings_of(together[name]["environment"], monkeypatch).redis_url
        target = RedisUrl.parse(url or "")
        assert [host for host, _ in target.addresses] == sentinels
        for sentinel in sentinels:
            assert f"sentinel monitor {target.service} queue 6379 2" in together[sentinel]["command"][-1]
    for name in ("queue", "replica-1", "replica-2", *sentinels):
        assert together[name]["read_only"]
        assert [mount["target"] for mount in together[name]["volumes"]] == ["/data"]
    for server in ("queue", "replica-1", "replica-2"):
        command = " ".join(together[server]["command"])
        assert "--maxmemory-policy noeviction --min-replicas-to-write 1 --min-replicas-max-lag 4" in command
        assert f"--replica-announce-ip {server}" in command


def test_every_image_can_export_traces() -> None:
    for stage, lock in (
        ("gateway-env", "requirements-gateway.lock"),
        ("worker-env", "requirements.lock"),
        ("worker-cuda-env", "requirements.lock"),
    ):
        assert f"pip install --require-hashes --no-deps -r /tmp/{lock}\n" in stages()[stage]
        assert "\nopentelemetry-exporter-otlp-proto-http==" in (ROOT / lock).read_text("utf-8")


def test_the_queue_server_of_compose_is_one_the_service_accepts(services: dict[str, Any]) -> None:
    command = " ".join(services["queue"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command
    assert services["queue"]["read_only"]


def test_what_compose_mounts_and_prometheus_asks_is_there(services: dict[str, Any]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", []) if mount["type"] == "bind"]
    assert len(mounts) == 3
    assert all(Path(mount["source"]).is_dir() for mount in mounts)
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    asked = {(name, each["port"]) for job in scraped for each in job["dns_sd_configs"] for name in each["names"]}
    assert asked == {("gateway", 8000), ("workers", 9100)}


def test_grafana_finds_its_dashboard_and_the_dashboard_its_data(services: dict[str, Any]) -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text("utf-8"))["datasources"]
    [provider] = yaml.safe_load((provisioning / "dashboards/patchforge.yml").read_text("utf-8"))["providers"]
    assert source["url"] == "http://prometheus:9090"
    assert provider["options"]["path"] in [mount["target"] for mount in services["grafana"]["volumes"]]
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/patchforge.json").read_text("utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for part in (*panels, *dashboard["templating"]["list"], *(each for panel in panels for each in panel["targets"])):
        assert part["datasource"] == {"type": "prometheus", "uid": source["uid"]}
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
