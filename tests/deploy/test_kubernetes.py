"""The manifests as kustomize renders them: checked with Kubernetes's own schemas, and compared with the code."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from patchforge.service.settings import Settings
from patchforge.service.tracing import exporters_wanted
from tests.deploy.test_containers import settings_of, stages
from tests.processes import run

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSION = "1.32"
KUBECTL = shutil.which("kubectl")
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="no kubectl here, whose kustomize renders overlays")
SHIPPED = ("emoji-class", "emoji-text")
Manifest = dict[str, Any]


def rendered(overlay: str | Path) -> list[Manifest]:
    if KUBECTL is None:
        pytest.skip("no kubectl here, whose kustomize renders overlays")
    return list(yaml.safe_load_all(run(KUBECTL, "kustomize", FOLDER / overlay).stdout))


def rendered_together(tmp_path: Path) -> list[Manifest]:
    """The example kustomization in docs/operation.md, with every component, in its place."""
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    text = (FOLDER.parents[1] / "docs" / "operation.md").read_text("utf-8")
    [shown] = re.findall(r"^```\n(apiVersion: kustomize.*?)^```$", text, re.MULTILINE | re.DOTALL)
    mine = tmp_path / "kubernetes" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(shown, "utf-8")
    return rendered(mine)


def written() -> list[Manifest]:
    """Returns the files of the base, as written."""
    files = [*files_of(FOLDER / "base")]
    return [each for file in files for each in yaml.safe_load_all(file.read_text("utf-8"))]


def files_of(folder: Path) -> Iterator[Path]:
    for name in yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))["resources"]:
        path = folder / name
        yield from files_of(path) if path.is_dir() else [path]


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    [found] = [each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def one_named(things: list[Manifest], name: str) -> Manifest:
    [found] = [each for each in things if each["name"] == name]
    return found


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    return settings_of(one(written(), "ConfigMap", "patchforge")["data"], monkeypatch)


@pytest.mark.parametrize("manifest", written(), ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_the_schema_has_nothing_to_say(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_the_schema_would() -> None:
    wrong = one(written(), "Deployment", "worker") | {"replicas": 2}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


@needs_kubectl
@pytest.mark.parametrize("overlay", ["base", "gpu", "keda"])
def test_an_overlay_renders_to_valid_manifests_in_our_namespace(overlay: str) -> None:
    for manifest in rendered(overlay):
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "patchforge"
        if manifest["kind"] != "ScaledObject":  # KEDA's; its schema is not among Kubernetes's own
            kubernetes_validate.validate(manifest, VERSION, strict=True)


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_a_deployment(name: str, settings: Settings) -> None:
    pod = one(written(), "Deployment", name)["spec"]["template"]["spec"]
    [container] = pod["containers"]
    before_sigterm = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert pod["terminationGracePeriodSeconds"] >= before_sigterm + settings.stop_seconds
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"USER {pod['securityContext']['runAsUser']}:" in "".join(stages().values())
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"]
    assert container["image"].removeprefix("patchforge-") in stages()
    assert {*container} >= {"startupProbe", "livenessProbe"}
    assert {"secretRef": {"name": "patchforge", "optional": True}} in container["envFrom"]
    [writable] = container["volumeMounts"]  # for large uploads of gateways and compiled code of torch
    assert writable["mountPath"] == "/tmp"
    assert "emptyDir" in one_named(pod["volumes"], writable["name"])


def test_ports_and_probes_are_the_services_own(settings: Settings) -> None:
    [gateway] = one(written(), "Deployment", "gateway")["spec"]["template"]["spec"]["containers"]
    [worker] = one(written(), "Deployment", "worker")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in gateway["ports"] + worker["ports"]}
    assert ports == {
        "http": settings.http_port,
        "grpc": settings.grpc_port,
        "metrics": settings.worker_metrics_port,
    }
    assert gateway["readinessProbe"]["grpc"]["port"] == settings.grpc_port
    assert settings.host == "0.0.0.0"


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_a_budget_for_disruption_selects_its_pods(name: str) -> None:
    labels = one(written(), "Deployment", name)["spec"]["template"]["metadata"]["labels"]
    for kind, of in (("PodDisruptionBudget", name), ("Deployment", name)):
        assert one(written(), kind, of)["spec"]["selector"]["matchLabels"] == labels
    assert one(written(), "Service", f"{name}-pods")["spec"]["selector"] == labels


def test_the_queue_server_is_one_the_service_accepts(settings: Settings) -> None:
    [valkey] = one(written(), "StatefulSet", "queue")["spec"]["template"]["spec"]["containers"]
    arguments = " ".join(valkey["args"])
    assert "--maxmemory-policy noeviction" in arguments
    assert "--appendonly yes" in arguments
    assert valkey["securityContext"]["readOnlyRootFilesystem"]
    assert [mount["mountPath"] for mount in valkey["volumeMounts"]] == ["/data"]
    assert settings.redis_url == "redis://queue:6379/0"
    one(written(), "Service", "queue")


def test_only_gateways_and_workers_may_speak_to_the_queue_server() -> None:
    def labels(kind: str, name: str) -> dict[str, str]:
        return one(written(), kind, name)["spec"]["template"]["metadata"]["labels"]

    policy = one(written(), "NetworkPolicy", "queue")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels("StatefulSet", "queue")
    [rule] = policy["ingress"]
    welcome = [each["podSelector"]["matchLabels"] for each in rule["from"]]
    assert welcome == [labels("Deployment", "gateway"), labels("Deployment", "worker")]
    [valkey] = one(written(), "StatefulSet", "queue")["spec"]["template"]["spec"]["containers"]
    assert rule["ports"][0]["port"] in {port["name"] for port in valkey["ports"]}


def test_traces_go_nowhere_until_someone_says_where() -> None:
    assert exporters_wanted(one(written(), "ConfigMap", "patchforge")["data"]) == []


def test_prometheus_finds_the_pods() -> None:
    scraped = yaml.safe_load((FOLDER.parent / "prometheus" / "kubernetes.yml").read_text("utf-8"))["scrape_configs"]
    for job in scraped:
        [discovery] = job["dns_sd_configs"]
        service, namespace = discovery["names"][0].split(".")[:2]
        assert namespace == "patchforge"
        assert one(written(), "Service", service)["spec"]["ports"][0]["port"] == discovery["port"]


@needs_kubectl
def test_every_component_goes_with_every_other(tmp_path: Path, settings: Settings) -> None:
    manifests = rendered_together(tmp_path)
    for manifest in manifests:
        if manifest["kind"] not in ("Namespace", "ScaledObject"):
            kubernetes_validate.validate(manifest, VERSION, strict=True)
    for model in SHIPPED:
        one(manifests, "ScaledObject", f"worker-{model}")
        worker = one(manifests, "Deployment", f"worker-{model}")["spec"]
        assert "replicas" not in worker
        [container] = worker["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert container["image"] == "registry.example.com/patchforge-worker-cuda:0.1.0"
        assert one_named(container["volumeMounts"], "redis")

    pod = one(manifests, "Deployment", "gateway")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["image"] == "registry.example.com/patchforge-gateway:0.1.0"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
        assert "grpc" not in container[probe]
    mount = one_named(container["volumeMounts"], "tls")
    assert {each["name"]: each["value"] for each in container["env"]} == {
        "PATCHFORGE_TLS_CERT": f"{mount['mountPath']}/tls.crt",
        "PATCHFORGE_TLS_KEY": f"{mount['mountPath']}/tls.key",
    }
    assert one_named(pod["volumes"], "tls")["secret"]["secretName"] == "patchforge-tls"


@needs_kubectl
@pytest.mark.parametrize("model", SHIPPED)
def test_each_model_has_its_own_autoscaler_which_owns_the_number_of_its_workers(model: str) -> None:
    manifests = rendered("keda")
    scaler = one(manifests, "ScaledObject", f"worker-{model}")["spec"]
    worker = one(manifests, "Deployment", scaler["scaleTargetRef"]["name"])
    assert "replicas" not in worker["spec"]
    [container] = worker["spec"]["template"]["spec"]["containers"]
    assert container["env"] == [{"name": "PATCHFORGE_MODELS", "value": model}]
    assert (scaler["minReplicaCount"], scaler["fallback"]["replicas"] > 0) == (0, True)
    assert scaler["maxReplicaCount"] > scaler["fallback"]["replicas"]
    [trigger] = scaler["triggers"]
    assert trigger["type"] == "prometheus"
    assert 0 < int(trigger["metadata"]["threshold"]) <= Settings().max_running
    assert trigger["metadata"]["ignoreNullValues"] == "false", "KEDA takes text"
    assert f'{{model="{model}"}}' in trigger["metadata"]["query"]


@needs_kubectl
def test_workers_of_different_models_do_not_count_as_each_others(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = rendered("keda")
    workers = [each for each in manifests if each["kind"] == "Deployment" and "worker" in each["metadata"]["name"]]
    assert {each["metadata"]["name"] for each in workers} == {f"worker-{model}" for model in SHIPPED}
    chosen = [each["spec"]["selector"]["matchLabels"] for each in workers]
    assert len({tuple(labels.items()) for labels in chosen}) == len(workers)
    for each, labels in zip(workers, chosen, strict=True):
        assert each["spec"]["template"]["metadata"]["labels"] == labels
        for kind, name in (("Service", "worker-pods"), ("PodDisruptionBudget", "worker")):
            selector = one(manifests, kind, name)["spec"]["selector"]
            assert selector.get("matchLabels", selector).items() <= labels.items()


@needs_kubectl
def test_a_model_without_workers_is_still_accepted_where_they_scale_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(one(rendered("keda"), "ConfigMap", "patchforge")["data"], monkeypatch)
    assert settings.remember_seconds > 86400
    assert "PATCHFORGE_REMEMBER_SECONDS" not in one(rendered("base"), "ConfigMap", "patchforge")["data"]


@needs_kubectl
def test_the_gpu_overlay_asks_for_one_and_the_other_image() -> None:
    [container] = one(rendered("gpu"), "Deployment", "worker")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["image"].startswith("patchforge-worker-cuda:")
    assert "worker-cuda" in stages()
