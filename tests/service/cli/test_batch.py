"""`patchforge batch`: a file of requests in, results and pictures out, however often it is stopped."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from patchforge.service.cli import batch as command
from patchforge.service.cli.batch import BatchRun
from patchforge.service.client import Client
from patchforge.service.errors import InvalidRequest, JobFailed
from patchforge.service.gateway.batches import feeder
from tests.processes import PATCHFORGE, launch, run
from tests.service.gateway.conftest import gateway, settings, url, worker
from tests.service.gateway.harness import ScriptedWorker, png

__all__ = ["gateway", "settings", "url", "worker"]


@pytest.fixture(autouse=True)
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "BUSY_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "IDLE_SECONDS", 0.02)
    monkeypatch.setattr(command, "POLL_SECONDS", 0.02)


def requests(tmp_path: Path, *bodies: dict[str, Any] | bytes) -> Path:
    lines = [
        body if isinstance(body, bytes) else json.dumps({"custom_id": f"c/{index}", "body": body}).encode()
        for index, body in enumerate(bodies)
    ]
    file = tmp_path / "requests.jsonl"
    file.write_bytes(b"\n".join(lines))
    return file


def results(out: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["line"] for line in lines}) == len(lines)
    return {line["line"]: line for line in lines}


def command_for(file: Path, out: Path, url: str, *more: str) -> list[str | Path]:
    return [*PATCHFORGE, "batch", file, "--server", url, "--out", out, "--endpoint", "/v1/jobs", *more]


async def test_a_file_in_and_results_out(tmp_path: Path, url: str, worker: ScriptedWorker) -> None:
    good = {"prompt": "apple", "seed": 7, "n": 2}
    file = requests(tmp_path, good, b"", {"prompt": "fail"}, b"no json", {"prompt": "pear", "seed": 9})
    out = tmp_path / "made" / "out.jsonl"
    out.parent.mkdir()
    ran = await asyncio.to_thread(run, *command_for(file, out, url, "--part", "2"), status=0)
    assert ran.stdout == f"{out}  has 4 results; 2 of them failed\n"
    made = results(out)
    assert [made[number]["custom_id"] for number in (1, 3, 4, 5)] == ["c/0", "c/2", None, "c/4"]
    assert made[1]["paths"] == ["out-pictures/000001-c-0-0.png", "out-pictures/000001-c-0-1.png"]
    assert [(out.parent / path).read_bytes() for path in made[1]["paths"]] == [png(7), png(8)]
    assert made[1]["report"]["savings_ratio"] == pytest.approx(1 / 3)
    assert made[3]["error"] == {"code": "out_of_memory", "message": "the picture is too big"}
    assert made[4]["error"]["code"] == "invalid_request"
    assert sorted(path.name for path in out.parent.iterdir()) == ["out-pictures", "out.jsonl"]
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.get("/v1/batches")).json()["data"] == [], "what was fetched is deleted"
    again = await asyncio.to_thread(run, *command_for(file, out, url), status=0)
    assert again.stdout == ran.stdout
    assert worker.played == 3


async def test_a_killed_run_goes_on(tmp_path: Path, url: str, worker: ScriptedWorker) -> None:
    """Killed while the server draws, then with a result half written."""
    file = requests(tmp_path, *({"prompt": "apple", "seed": seed} for seed in range(12)))
    out = tmp_path / "out.jsonl"
    worker.curtain.clear()
    process = launch(*command_for(file, out, url))
    await worker.next_job()
    process.kill()
    await asyncio.to_thread(process.wait)
    worker.curtain.set()
    assert (await asyncio.to_thread(run, *command_for(file, out, url), status=0)).stdout.endswith("12 results\n")
    assert len(results(out)) == worker.played == 12
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])
    await asyncio.to_thread(run, *command_for(file, out, url), status=0)
    assert len(results(out)) == 12
    assert worker.played == 13


MOMENTS = ["create_batch", "batch", "batch_results", "batch_pictures", "delete_batch"]


@pytest.mark.parametrize("moment", MOMENTS)
async def test_no_moment_draws_twice(
    tmp_path: Path, url: str, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The run ends right after a call to the server, before it can note anything."""

    class Killed(BaseException):
        pass

    call = getattr(Client, moment)

    def deadly(self: Client, *arguments: Any, **options: Any) -> Any:
        answer = call(self, *arguments, **options)
        raise Killed(answer)

    file = requests(tmp_path, *({"prompt": "apple", "seed": seed} for seed in range(5)))
    out = tmp_path / "out.jsonl"

    def once() -> None:
        with Client(url) as client:
            BatchRun(file, out, "/v1/jobs", 3).run(client, lambda there: None)

    with monkeypatch.context() as patch:
        patch.setattr(Client, moment, deadly)
        with pytest.raises(Killed):
            await asyncio.to_thread(once)
    await asyncio.to_thread(once)
    assert sorted(results(out)) == [1, 2, 3, 4, 5]
    assert worker.played == 5
    assert not out.with_name("out.jsonl.batch").exists()


async def test_a_batch_that_somebody_cancels(tmp_path: Path, url: str, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    file = requests(tmp_path, *({"prompt": "apple", "seed": seed} for seed in range(40)))
    out = tmp_path / "out.jsonl"

    def once() -> None:
        with Client(url) as client:
            BatchRun(file, out, "/v1/jobs", 100).run(client, lambda there: None)

    running = asyncio.create_task(asyncio.to_thread(once))
    await worker.next_job()
    async with httpx.AsyncClient(base_url=url) as http:
        [batch] = (await http.get("/v1/batches")).json()["data"]
        await http.post(f"/v1/batches/{batch['id']}/cancel")
    with pytest.raises(JobFailed, match="cancelled"):
        await running
    assert results(out) == {}
    worker.curtain.set()
    await asyncio.to_thread(once)
    assert len(results(out)) == 40


async def test_results_of_another_file(tmp_path: Path, url: str, worker: ScriptedWorker) -> None:
    file, out = requests(tmp_path, {"prompt": "apple"}), tmp_path / "out.jsonl"
    for text, message in [
        ('{"line": 1, "custom_id": "other", "status": "completed"}\n', "has the results of another file"),
        ('{"line": 2, "custom_id": "c/0", "status": "completed"}\n', "has the results of another file"),
        ("prompt\n", "other things than results"),
        ("[]\n", "other things than results"),
    ]:
        out.write_text(text)
        with pytest.raises(InvalidRequest, match=message):
            BatchRun(file, out, None, 10)
    file.write_bytes(b"\n")
    ran = await asyncio.to_thread(run, *command_for(file, tmp_path / "new.jsonl", url), status=1)
    assert ran.stderr == f"error: {file} has no requests\n"
    out.unlink()
    requests(tmp_path, {"prompt": "apple"})
    lost = await asyncio.to_thread(run, *command_for(file, out, "http://127.0.0.1:9"), status=1)
    assert "no answer from http://127.0.0.1:9" in lost.stderr
