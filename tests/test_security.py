"""What must never happen: a pickle on a serving path, a secret in a log, a port open to the network by default."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import grpc
import pytest

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway.app import Gateway
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.faults.gateways import SHORT
from tests.faults.gateways import Gateway as GatewayProcess
from tests.faults.harness import Stack
from tests.processes import PATCHFORGE, run
from tests.test_imports import reached

ROOT = Path(__file__).parents[1]
TRAINING = ROOT / "model" / "training"
SERVING = [path for part in ("model", "service") for path in sorted((ROOT / part).rglob("*.py"))]
SERVING = [path for path in SERVING if TRAINING not in path.parents]
EVALUATING = {ROOT / "model" / "evaluation" / "efficientnet.py"}
"""Code that measures pictures, and does not serve them."""
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
        options = {option.arg: option.value for option in call.keywords}
        if ast.unparse(call.func) == "torch.load" and path in EVALUATING:
            # A file from a package, not from a user; PyTorch's reader then builds only tensors.
            assert ast.unparse(options["weights_only"]) == "True"
            continue
        assert ast.unparse(call.func) not in LOADERS
        assert not {"trust_remote_code", "allow_pickle"} & options.keys()
        if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
            local, safe = options.get("local_files_only"), options.get("use_safetensors")
            assert isinstance(local, ast.Constant)
            assert local.value is True
            if "Tokenizer" not in ast.unparse(call.func):
                assert isinstance(safe, ast.Constant)
                assert safe.value is True


def test_no_server_loads_the_training_code_and_that_reads_only_weights() -> None:
    for server in ("patchforge.service.worker.main", "patchforge.service.gateway.app", "patchforge.service.supervisor"):
        modules = reached(server)
        assert len(modules) > 10
        assert not [module for module in modules if module.startswith("patchforge.model.training")]
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
    """Returns (address, port) of every open TCP port of this machine; real IPv6 addresses in hexadecimal."""
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        if not path.exists():
            pytest.skip("no /proc/net")
        for line in path.read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":
                address, _, port = local.partition(":")
                address = address.removeprefix("0000000000000000FFFF0000")  # IPv4 written as IPv6
                host = (
                    ".".join(str(byte) for byte in reversed(bytes.fromhex(address))) if len(address) == 8 else address
                )
                found.add((host, int(port, 16)))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="what starts the processes is Linux's")
@pytest.mark.parametrize("together", [False, True], ids=["gateway and worker", "serve"])
def test_no_secret_is_ever_logged(
    together: bool, tmp_path: Path, bundle_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No password, key or hash, right or wrong, during start-up, use, refusals and after losing the queue server."""
    password, guess, key, wrong = "redis-pa55word", "gue55ed-password", "caller-s3cret", "wrong-s3cret"
    digest = sha256(key.encode()).hexdigest()
    settings = {"api_keys": [f"tester:{digest}"], "log_level": "DEBUG", "drain_seconds": 1}
    with Stack(tmp_path, bundle_dir, **settings) as stack:
        stack.redis.config_set("requirepass", password)
        url, bad_url = (stack.server.url.replace("//", f"//default:{each}@") for each in (password, guess))
        if together:
            gateway = worker = stack.start_serve(tmp_path / "serve", redis_url=url)
        else:
            gateway, worker = stack.start_pair(redis_url=url)
        shut_out = [
            stack.launch_worker(redis_url=bad_url),
            stack._launch(GatewayProcess, "gateway", None, {"redis_url": bad_url}),
        ]

        for secret in (wrong, key):
            gateway.http.headers["authorization"] = f"Bearer {secret}"
            admitted = secret == key
            assert (gateway.post(SHORT).status_code == 202) is admitted
            gateway.http.get("/v1/jobs/x/events")
            with gateway.grpc() as stub, pytest.raises(grpc.RpcError):
                stub.GetJob(pb.GetJobRequest(job_id="x"), metadata=[("x-api-key", secret)])
        assert gateway.ended(gateway.submit())["status"] == "completed"
        assert [process.wait() for process in shut_out] == [1, 1]
        assert all("refuses the user or password" in process.transcript() for process in shut_out)
        stack.server.stop()
        worker.wait_for("queue server cannot be used")
        gateway.wait_for("not ready")
        assert gateway.ready().status_code == 503
        processes = {gateway, worker}
        assert [process.terminate() for process in processes] == [0] * len(processes)
        written = "".join((*(process.transcript() for process in (*processes, *shut_out)), *capfd.readouterr()))
    assert "worker ready" in written
    assert "job completed" in written
    for secret in (password, guess, key, wrong, digest, sha256(wrong.encode()).hexdigest()):
        assert secret not in written


@pytest.mark.parametrize("role", ["gateway", "worker", "serve"])
@pytest.mark.parametrize("url", ["redis://:pa55/word@host:6379/0", "redis://:pa55word@[host/0", "pa55word"])
def test_a_queue_server_that_cannot_be_read_is_one_line_without_it(role: str, url: str) -> None:
    """A URL parser takes the first part of a password with a slash for a port."""
    ran = run(*PATCHFORGE, role, status=2, PATCHFORGE_REDIS_URL=url)
    assert "PATCHFORGE_REDIS_URL" in ran.stderr
    assert "percent-encoded" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "pa55" not in ran.stdout + ran.stderr
