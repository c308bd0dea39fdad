"""Gateways that die while they feed a batch."""

from __future__ import annotations

import json
from collections import Counter

from patchforge.service.queue import keys
from tests.faults.gateway_kit import Stage
from tests.faults.tap import tapped
from tests.processes import eventually

LINES = 40
FEED = b"\r\n$9\r\nfeed_line\r\n"  # the queue's commands, as redis-py sends them
STEP = b"\r\n$10\r\nstep_batch\r\n"


def test_row_30_gateways_killed_while_they_feed(own_stage: Stage) -> None:
    """Before and after the queue server has queued a line, and after it has noted how jobs ended."""
    bodies = [{"model": "tiny-text", "prompt": "a red apple", "seed": seed} for seed in range(LINES)]
    lines = [{"custom_id": str(body["seed"]), "url": "/v1/jobs", "body": body} for body in bodies]
    content = "\n".join(map(json.dumps, lines)).encode()
    own_stage.gateway.kill()
    batch = ""
    with tapped(own_stage.server.url) as wire, own_stage.redis as redis:
        for moment, command in ((wire.once, FEED), *((wire.once_answered, each) for each in (FEED, STEP, FEED))):
            dying = own_stage.start_gateway(redis_url=wire.url, batch_in_flight=4)
            dying.await_ready()
            if not batch:
                headers = {"Content-Type": "application/jsonl"}
                batch = dying.http.post("/v1/batches", content=content, headers=headers).json()["id"]
            moment(command, dying.kill)
            dying.wait()
            assert redis.get(keys.BATCH_LEADER), "it can no longer give its place up"
        jobs = len(own_stage.jobs())
        assert 2 <= jobs < LINES, "they died in the middle"
        last = own_stage.start_gateway()

        def ended() -> bool:
            return bool(last.http.get(f"/v1/batches/{batch}").json()["status"] == "completed")

        eventually(ended)
        state = last.http.get(f"/v1/batches/{batch}").json()
        assert state["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
        seeds = Counter(json.loads(redis.hget(keys.job(job), "request"))["seed"] for job in own_stage.jobs())
        assert seeds == dict.fromkeys(range(LINES), 1)
    results = last.http.get(f"/v1/files/{state['output_file_id']}/content").text.splitlines()
    assert [json.loads(line)["custom_id"] for line in results] == [str(seed) for seed in range(LINES)]
    last.wait_for("a batch has ended")
    assert last.metric("patchforge_batches_total", workers=False, status="completed") == 1
    assert 0 < last.metric("patchforge_batch_lines_total", workers=False, outcome="completed") <= LINES
