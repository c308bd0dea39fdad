"""What must not be: a pickle on a serving path, a secret in a log, a port open to the network unasked."""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from redis import Redis

from service.embedded import EmbeddedServer, free_port
from service.gateway.app import Gateway
from service.queue import JobQueue
from service.settings import Settings
from tests.test_imports import reached

ROOT = Path(__file__).parents[1]
TRAINING = ROOT / "model" / "training"
SERVING = [path for part in ("model", "service") for path in sorted((ROOT / part).rglob("*.py"))]
SERVING = [path for path in SERVING if TRAINING not in path.parents]
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
LOADERS = {"torch.load", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load", "yaml.load", "eval", "exec"}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", SERVING, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_serves_can_run_a_pickle(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    found = set(imports(tree))
    assert not {name.partition(".")[0] for name in found} & UNPICKLERS
    assert not found & LOADERS
    for call in calls(tree):
        assert ast.unparse(call.func) not in LOADERS
        options = {option.arg: option.value for option in call.keywords}
        assert not {"trust_remote_code", "allow_pickle"} & options.keys()
        if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
            local, safe = options.get("local_files_only"), options.get("use_safetensors")
            assert isinstance(local, ast.Constant)
            assert local.value is True
            if "Tokenizer" not in ast.unparse(call.func):
                assert isinstance(safe, ast.Constant)
                assert safe.value is True


def test_no_server_loads_the_training_code_and_that_reads_only_weights() -> None:
    for server in ("service.worker.main", "service.gateway.app", "service.supervisor"):
        modules = reached(server)
        assert len(modules) > 10
        assert not [module for module in modules if module.startswith("model.training")]
    for path in TRAINING.rglob("*.py"):
        for call in calls(ast.parse(path.read_text("utf-8"))):
            if ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(call)


def test_the_rule_above_bites() -> None:
    assert "pickle" in set(imports(ast.parse("def f():\n    import pickle")))
    assert [ast.unparse(call.func) for call in calls(ast.parse("x = torch.load(path)"))] == ["torch.load"]
    assert len(SERVING) > 60


async def test_the_ports_opened_by_default_are_of_the_loopback_address(
    queue_server: EmbeddedServer, queue: JobQueue
) -> None:
    gateway = Gateway(Settings(redis_url=queue_server.url, http_port=0, grpc_port=0), queue)
    await gateway.startup()
    try:
        ours = {gateway.http_port, gateway.grpc_port}
        assert {host for host, port in listening() if port in ours} == {"127.0.0.1"}
        assert {port for _, port in listening()} >= ours
    finally:
        gateway.stop()
        await gateway.shutdown()


def listening() -> set[tuple[str, int]]:
    """(address, port) of every TCP port open on this machine; true IPv6 addresses as hexadecimal."""
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        if not path.exists():
            pytest.skip("no /proc/net")
        for line in path.read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":
                address, _, port = local.partition(":")
                address = address.removeprefix("0000000000000000FFFF0000")  # IPv4 in the clothes of IPv6
                host = (
                    ".".join(str(byte) for byte in reversed(bytes.fromhex(address))) if len(address) == 8 else address
                )
                found.add((host, int(port, 16)))
    return found


async def test_no_secret_is_ever_logged(queue_server: EmbeddedServer, tmp_path: Path) -> None:
    """Passwords, keys and their hashes, wrong ones too: through start-up, use, refusals and a lost queue server."""
    password, key, wrong = "redis-pa55word", "caller-s3cret", "wrong-s3cret"
    digest = sha256(key.encode()).hexdigest()
    http_port = free_port()
    server = EmbeddedServer(tmp_path)
    server.start()
    try:
        url = server.url.replace("//", f"//default:{password}@")
        with Redis.from_url(server.url) as admin:
            admin.config_set("requirepass", password)
        settings = {
            "REDIS_URL": url,
            "HTTP_PORT": str(http_port),
            "GRPC_PORT": "0",
            "API_KEYS": f"tester:{digest}",
            "LOG_LEVEL": "DEBUG",
            "DRAIN_SECONDS": "1",
        }
        environment = os.environ | {f"PATCHFORGE_{name}": value for name, value in settings.items()}
        log = tmp_path / "gateway.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "service.cli", "gateway"), env=environment, stdout=output, stderr=output
            )
        try:
            base = f"http://127.0.0.1:{http_port}"
            async with httpx.AsyncClient(base_url=base, timeout=60) as http:
                await until_alive(http)
                for secret in (key, wrong):
                    headers = {"authorization": f"Bearer {secret}"}
                    await http.post("/v1/jobs", headers=headers, json={"class_label": "cat"})
                    await http.get("/v1/jobs/x/events", headers=headers)
                server.stop()
                assert (await http.get("/readyz")).status_code == 503
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 30) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        text = log.read_text()
        assert "gateway is listening" in text
        assert "not ready" in text
        for secret in (password, key, wrong, digest):
            assert secret not in text
    finally:
        server.stop()


async def until_alive(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await http.get("/healthz")
                return
            except httpx.ConnectError:
                await asyncio.sleep(0.05)
