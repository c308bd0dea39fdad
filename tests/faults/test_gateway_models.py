"""With the real worker: callers who disconnect, and broken models."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.queue import keys
from tests.faults.gateway_kit import openai_client, post, raw
from tests.faults.gateways import SHORT, Gateway
from tests.faults.harness import Stack
from tests.model.model_files import Calls, config_tree, save, tiny_weights
from tests.processes import PATCHFORGE, Process, eventually, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# --- row 13 ---

# With random weights, `adaptive` (the default) would finish in a few evaluations.
LONG_CALL = b'{"model": "tiny-class", "prompt": "cat", "steps": 200, "sampler": "euler"}'


def test_row_13_client_leaves(stack: Stack) -> None:
    """If a caller leaves a synchronous call, the device stops before its next step. Detached jobs continue."""
    gateway, worker = stack.start_pair("held_device")
    with stack.device_held():
        detached = gateway.submit(SHORT | {"steps": 200})
        gateway.until(detached, "started")  # and disconnects
        everyone_else_leaves(gateway, worker, detached)
        ended = worker.mark()
    assert gateway.ended(detached)["status"] == "completed"
    further = [line["jobs"] for line in worker.log[ended:] if line["event"] == "step"]
    assert further.count([detached]) == len(further) > 1
    # What an operator sees.
    gateway.await_metric(3, "patchforge_requests_total", status="cancelled")
    gateway.await_metric(0, "patchforge_requests_running")


def everyone_else_leaves(gateway: Gateway, worker: Process, detached: str) -> None:
    """Three callers share a step with the detached job, and disconnect. Their jobs end while the device pauses."""
    connection = raw(gateway)
    connection.sendall(post("/v1/images/generations", LONG_CALL))
    with openai_client(gateway) as client, gateway.grpc() as stub:
        options = {"steps": 200, "sampler": "euler"}
        stream = client.images.generate(model="tiny-class", prompt="cat", stream=True, extra_body=options)
        wanted = pb.Generation(model="tiny-class", class_label="cat", steps=200, euler=pb.EulerSampler())
        generating = stub.GenerateImage(pb.GenerateImageRequest(generation=wanted))
        next(generating)

        def all_in_the_device() -> set[str] | None:
            jobs = set(worker.lines("step")[-1]["jobs"]) if worker.lines("step") else set()
            return jobs - {detached} if len(jobs) == 4 else None

        leaving = eventually(all_in_the_device, "all four to share a step")
        connection.close()
        stream.close()
        generating.cancel()

        for job in leaving:
            assert gateway.ended(job)["status"] == "cancelled"


def test_row_13_client_leaves_while_redis_is_away(stack: Stack) -> None:
    """The gateway remembers the job, and cancels it as soon as it can."""
    gateway, _ = stack.start_pair("held_device")
    with stack.device_held():
        connection = raw(gateway)
        connection.sendall(post("/v1/images/generations", LONG_CALL))
        with stack.redis as redis:
            [key] = eventually(lambda: redis.keys(keys.JOB + "*"))
        job = key.decode().removeprefix(keys.JOB)
        gateway.until(job, "started")
        stack.kill_server()
        connection.close()
        gateway.wait_for("an abandoned job will be cancelled when the queue server is back", job=job)
        stack.server.start()
        assert gateway.ended(job)["status"] == "cancelled"
    gateway.await_metric(1, "patchforge_requests_total", status="cancelled")
    gateway.await_metric(0, "patchforge_requests_running")


# --- row 21 ---


def truncated(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:100])


def huge_header(weights: Path) -> None:
    weights.write_bytes(struct.pack("<Q", 1 << 40) + weights.read_bytes()[8:])


def not_a_number(weights: Path) -> None:
    tensors = in_memory(weights)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, weights)


def autoencoder_not_a_number(weights: Path) -> None:
    not_a_number(weights.parent / "autoencoder" / "diffusion_pytorch_model.safetensors")


def pickled(weights: Path) -> None:
    torch.save(in_memory(weights), weights)


def in_memory(weights: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(weights).items()}  # else they map the file


def linked_elsewhere(weights: Path) -> None:
    weights.rename(weights.parents[2] / "elsewhere.safetensors")
    weights.symlink_to(weights.parents[2] / "elsewhere.safetensors")


DAMAGE: dict[Callable[[Path], None], str] = {
    huge_header: "a header of",
    not_a_number: "holds NaN or infinite values",
    autoencoder_not_a_number: "holds NaN or infinite values",
    pickled: "a header of",
    linked_elsewhere: "a link that leads out",  # row 25's symlink
}


@pytest.mark.timeout(900)
def test_row_21_broken_models(stack: Stack, tmp_path: Path, bundle_dir: Path) -> None:
    """Malicious, truncated, oversized, NaN: each is refused with its reason, and the old model is still served."""
    serving = tmp_path / "serving"
    shutil.copytree(bundle_dir / "tiny-class", serving / "tiny-class")
    gateway, worker = stack.start_pair(bundle_dir=serving)
    before = gateway.picture(gateway.ended(gateway.submit())["id"])

    def still_serves() -> None:
        job = gateway.ended(gateway.submit())
        assert job["status"] == "completed"
        assert np.abs(gateway.picture(job["id"]) - before).max() <= 1

    # A checkpoint that is a program, imported over the model that is being served.
    whole = {path: path.read_bytes() for path in serving.rglob("*") if path.is_file()}
    marker = tmp_path / "marker"
    attack = save(tmp_path, config_tree(), tiny_weights(), payload=Calls(os.system, f"touch {marker}"))
    options = "--autoencoder", bundle_dir / ".autoencoder", "--out", serving / "tiny-class"
    ran = run(*PATCHFORGE, "import-checkpoint", attack, *options, status=1)
    assert f"refused: it contains the global {os.name}.system" in ran.stderr
    assert not marker.exists()
    assert {path: path.read_bytes() for path in serving.rglob("*") if path.is_file()} == whole

    # Bad weights: no worker starts with them, even if they replace those of a running worker.
    refused = []
    for damage, reason in DAMAGE.items():
        bundles = tmp_path / damage.__name__ / "bundles"
        shutil.copytree(bundle_dir / "tiny-class", bundles / "tiny-class")
        damage(bundles / "tiny-class" / "model.safetensors")
        refused.append((stack.launch_worker(bundle_dir=bundles), reason))
    for weights in serving.rglob("*.safetensors"):
        truncated(weights)  # in place, like an interrupted copy
    refused.append((stack.launch_worker(bundle_dir=serving), "truncated: the header alone has"))
    for newcomer, reason in refused:
        assert newcomer.wait(240) == 1  # seven processes start at once
        assert any(line.startswith("error: ") and reason in line for line in newcomer.stray), newcomer.transcript()
    still_serves()
    assert worker.running
