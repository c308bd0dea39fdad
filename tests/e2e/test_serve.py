"""From a request over each protocol to a picture of the shipped models, its savings and its metrics."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from openai import OpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import Progress

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub
from tests.e2e.conftest import Served, start
from tests.patience import PATIENCE

PROMPT = {"model": "emoji-text", "prompt": "red apple, 3d", "seed": 7}
PLAIN = ("red apple", "red heart", "blue circle", "crescent moon", "key", "egg", "lemon", "cookie")
"""One thing in one colour on white."""


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)


@pytest.fixture
def http(served: Served):
    with httpx.Client(base_url=served.http, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def openai_client(served: Served):
    with OpenAI(base_url=f"{served.http}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def stub(served: Served):
    with grpc.insecure_channel(served.grpc) as channel:
        yield ImageServiceStub(channel)


def finished(http: httpx.Client, job_id: str) -> dict:
    """Reads a job's events to the end, and returns the job."""
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        for _ in stream.iter_lines():
            pass
    return http.get(f"/v1/jobs/{job_id}").json()


def test_a_native_job_from_submit_to_picture(http: httpx.Client) -> None:
    accepted = http.post("/v1/jobs", json=PROMPT)
    assert accepted.status_code == 202
    job = finished(http, accepted.json()["id"])
    assert job["status"] == "completed"
    made = http.get(f"/v1/jobs/{job['id']}/image")
    assert made.headers["content-type"] == "image/png"
    assert picture(made.content).shape == (256, 256, 3)
    report = job["report"]
    assert report["savings_ratio"] == pytest.approx(1 - report["patch_evaluations"] / report["dense_patch_evaluations"])
    assert 0.1 < report["savings_ratio"] < 0.9
    evaluations = report["images"][0]["finished_at"]
    assert 0 < min(evaluations) < max(evaluations), "easy patches finish before hard ones"


def test_plain_pictures_are_largely_finished_half_way(http: httpx.Client) -> None:
    """Compares the report with the events of the stream."""
    shares = []
    for prompt in PLAIN:
        job = http.post("/v1/jobs", json={"model": "emoji-text", "prompt": prompt, "seed": 1, "n": 2}).json()
        with http.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
            events = [json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:")]
        assert events[-1]["type"] == "completed"
        for index in range(2):
            told = [event for event in events if event["type"] == "patches" and event["index"] == index]
            times = [time for event in told for time in event["times"]]
            assert len(times) == 256
            shares.append(sum(time <= 0.5 for time in times) / 256)
    assert sum(shares) / len(shares) >= 0.4


def test_a_finished_patch_is_never_evaluated_again(http: httpx.Client) -> None:
    """With one branch and no skipping, a patch costs one evaluation each until the one that reports it as finished."""

    def drawn(**options: float | bool) -> tuple[int, dict]:
        """Returns the cost that the stream's `patches` events allow, and the cost in the report."""
        sampler = {"name": "adaptive", "tolerance": 0.2, "skip_tolerance": 0, **options}
        body = PROMPT | {"guidance": 1, "steps": 12, "sampler": sampler}
        job = http.post("/v1/jobs", json=body).json()
        with http.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
            events = [json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:")]
        told = [(patch, e["evaluation"]) for e in events if e["type"] == "patches" for patch in e["patches"]]
        [report] = events[-1]["report"]["images"]
        assert sorted(told) == list(enumerate(report["finished_at"])), "each patch is told of once, and as reported"
        return sum(evaluation for _, evaluation in told), report

    allowed, report = drawn()
    assert report["patch_evaluations"] == allowed < report["dense_patch_evaluations"]
    allowed, report = drawn(exact=True)  # evaluates finished patches again, so this test would notice
    assert allowed < report["patch_evaluations"] == report["dense_patch_evaluations"]


def test_the_same_picture_over_every_protocol_and_offline(
    http: httpx.Client, openai_client: OpenAI, stub: ImageServiceStub
) -> None:
    from patchforge.service.cli.album import Wanted
    from patchforge.service.cli.drawing import Drawn
    from patchforge.service.cli.offline import draw_offline

    job = finished(http, http.post("/v1/jobs", json=PROMPT).json()["id"])
    native = picture(http.get(f"/v1/jobs/{job['id']}/image").content)
    answer = openai_client.images.generate(model="emoji-text", prompt=PROMPT["prompt"], extra_body={"seed": 7})
    openai = picture(b64decode(answer.data[0].b64_json))
    wanted = pb.Generation(model="emoji-text", prompt=PROMPT["prompt"], seed=7)
    events = [answer.event for answer in stub.GenerateImage(pb.GenerateImageRequest(generation=wanted))]
    [rpc] = [picture(event.image.data) for event in events if event.WhichOneof("event") == "image"]
    kept: list[Drawn] = []
    draw_offline(Path("emoji-text"), [Wanted(PROMPT["prompt"], 7)], Progress(disable=True), kept.append)
    [drawn] = kept
    offline = picture(drawn.picture.data)
    for other in (openai, rpc, offline):
        assert np.abs(native - other).max() <= 1
    assert drawn.savings == pytest.approx(job["report"]["savings_ratio"])


async def test_a_burst_of_mixed_requests_gives_what_each_gives_alone(served: Served) -> None:
    mix = [
        {"model": "emoji-text", "prompt": "blue heart", "seed": 1, "sampler": "euler", "steps": 12, "guidance": 1},
        {"model": "emoji-text", "prompt": "tiger face", "seed": 2, "sampler": "look_ahead", "steps": 10},
        {"model": "emoji-text", "prompt": "pizza", "seed": 3, "n": 3},
        {"model": "emoji-text", "prompt": "panda face, noto", "seed": 6},
        {"model": "emoji-text", "prompt": "blue heart", "seed": 7, "width": 128, "height": 128},
        {"model": "emoji-class", "class_label": "food-fruit", "seed": 4},
        {"model": "emoji-class", "class_label": "cat-face", "seed": 5, "guidance": 1.5, "steps": 5},
    ]

    async with httpx.AsyncClient(base_url=served.http, timeout=PATIENCE) as client:

        async def pictures(body: dict) -> list[np.ndarray]:
            job = (await client.post("/v1/jobs", json=body)).json()
            async with client.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
                async for _ in stream.aiter_lines():
                    pass
            ids = range(body.get("n", 1))
            answers = [await client.get(f"/v1/jobs/{job['id']}/image", params={"index": i}) for i in ids]
            return [picture(answer.content) for answer in answers]

        together = await asyncio.gather(*(pictures(body) for body in mix))
        alone = [await pictures(body) for body in mix]
    for packed, single in zip(together, alone, strict=True):
        assert np.abs(np.array(packed) - np.array(single)).max() <= 1


def test_openai_streams_partial_images(openai_client: OpenAI) -> None:
    options = {"seed": 1, "steps": 20, "sampler": "dual_loop"}  # long enough for a preview on any machine
    stream = openai_client.images.generate(
        model="emoji-text", prompt="green apple", stream=True, partial_images=2, extra_body=options
    )
    events = list(stream)
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds in (["partial_image", "completed"], ["partial_image", "partial_image", "completed"])
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))
    last, final = (picture(b64decode(event.b64_json)) for event in events[-2:])
    assert np.abs(last - final).mean() < 40  # an estimate of the same picture, not noise
    assert events[-1].usage.output_tokens > 0


def test_metrics_show_what_was_saved(http: httpx.Client) -> None:
    def sample(name: str) -> float:
        families = text_string_to_metric_families(http.get("/metrics").text)
        wanted = {"model": "emoji-class", "sampler": "look_ahead"}  # used by no other test
        return sum(
            s.value for f in families for s in f.samples if s.name == name and wanted.items() <= s.labels.items()
        )

    names = ["patchforge_patch_evaluations_total", "patchforge_patch_evaluations_saved_total"]
    names += ["patchforge_request_step_savings_ratio_sum", "patchforge_request_step_savings_ratio_count"]
    before = [sample(name) for name in names]
    body = {"model": "emoji-class", "class_label": "clothing", "seed": 3, "sampler": "look_ahead", "guidance": 2}
    report = finished(http, http.post("/v1/jobs", json=body).json()["id"])["report"]
    expected = [
        report["patch_evaluations"],
        report["dense_patch_evaluations"] - report["patch_evaluations"],
        report["savings_ratio"],
        1,
    ]
    give_up = time.monotonic() + PATIENCE
    while True:
        grown = [sample(name) - old for name, old in zip(names, before, strict=True)]
        if grown == pytest.approx(expected) or time.monotonic() > give_up:
            break
        http.get("/healthz")
    assert grown == pytest.approx(expected)


def test_leaving_a_synchronous_call_cancels_it(http: httpx.Client, served: Served) -> None:
    slow = {"model": "emoji-text", "prompt": "castle", "n": 4, "steps": 100}

    def left_after(seconds: float) -> bool:
        """Tells whether such a call was cancelled. A call that ends early may not have been accepted yet."""
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.http}/v1/images/generations", json=slow, timeout=seconds)
        # No work is left: the next request does not wait for a thousand evaluations.
        job = finished(http, http.post("/v1/jobs", json=PROMPT).json()["id"])
        assert job["status"] == "completed"
        give_up = time.monotonic() + 10 * seconds
        while not cancelled() and time.monotonic() < give_up:
            time.sleep(0.1)
        return cancelled()

    def cancelled() -> bool:
        lines = http.get("/metrics").text.splitlines()
        return any('status="cancelled"' in line and not line.endswith(" 0.0") for line in lines)

    assert any(map(left_after, (1.0, 4.0, 16.0)))


def test_memory(served: Served, http: httpx.Client) -> None:
    finished(http, http.post("/v1/jobs", json=PROMPT).json()["id"])
    assert served.memory() < 200 << 20
    sizes = [child.memory_info().rss for child in served.children()]
    assert len(sizes) == 2
    assert max(sizes) < 2048 << 20


def test_the_first_sight_of_the_page_and_the_api_document(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.status_code == 200
    assert "Patchforge" in page.text
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/jobs", "/v1/images/generations", "/v1/jobs/{job_id}/events"} <= set(paths)
    assert http.get("/docs").status_code == 200


def test_sigterm_ends_every_process_and_jobs_survive_the_restart(tmp_path: Path) -> None:
    first = start(tmp_path)
    children = first.children()
    with httpx.Client(base_url=first.http, timeout=PATIENCE) as client:
        job = client.post("/v1/jobs", json=PROMPT).json()
        before = finished(client, job["id"])
    assert first.terminate() == 0
    assert not [child for child in children if child.is_running()]
    second = start(tmp_path)
    try:
        with httpx.Client(base_url=second.http, timeout=PATIENCE) as client:
            assert client.get(f"/v1/jobs/{job['id']}").json() == before
    finally:
        assert second.terminate() == 0


def test_bad_input_is_refused_by_field(http: httpx.Client, stub: ImageServiceStub) -> None:
    for body, field in [
        ({**PROMPT, "n": 0}, "n"),
        ({**PROMPT, "steps": 10**9}, "steps"),
        ({**PROMPT, "sampler": "warp"}, "sampler"),
        ({"model": "emoji-class", "class_label": "unicorn"}, "class_label"),
        ({"model": "emoji-class", "prompt": "unicorn"}, "prompt"),
        ({**PROMPT, "guidance": "strong"}, "guidance"),
    ]:
        answer = http.post("/v1/jobs", json=body)
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["field"].startswith(field)
    with pytest.raises(grpc.RpcError) as caught:
        stub.SubmitJob(pb.SubmitJobRequest(generation=pb.Generation(prompt="x", model="emoji-text", n=99)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "n:" in caught.value.details()
    assert json.loads(http.get("/readyz").text)["status"] == "ready"
