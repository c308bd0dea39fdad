"""Rows 22 and 23 for calls with pictures or tensors: forms, and the Open Inference Protocol; no room for uploads."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from patchforge.service.pb.inference.grpc_inference_service_pb2_grpc import GRPCInferenceServiceStub
from tests.faults.gateway_kit import APPLE, JSON, Stage, answer_to, refusal, status_of, unharmed
from tests.faults.gateways import Gateway
from tests.processes import PATCHFORGE
from tests.service.gateway.inference import test_rest as test_inference_rest
from tests.service.gateway.inference import test_rpc as test_inference_rpc
from tests.service.gateway.pictures import encoded, gradient, mask, with_chunk
from tests.service.gateway.test_validation import BAD_BODIES

EDITS, INFER = "/v1/images/edits", "/v2/models/tiny-text/infer"
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
LENGTH = "Inference-Header-Content-Length"
SERVICE = "/inference.GRPCInferenceService"
PICTURE = encoded(gradient())
SOUND = {"prompt": "x", "model": "tiny-text"}


# --- row 22 ---

BAD_FIELDS: list[dict[str, str]] = [
    {"guidance": "NaN"},
    {"guidance": "1e999"},
    {"guidance": "9" * 5000},
    {"n": "9" * 5000},
    {"n": "1.5"},
    {"n": "true"},
    {"n": "null and void"},
    {"seed": "-1"},
    {"steps": "1000000"},
    {"strength": "0"},
    {"strength": "1e-320"},
    {"strength": "-0.0"},
    {"size": "99999x99999"},
    {"prompt": ""},
    {"prompt": "a\0b"},
    {"prompt": "x" * 3000},
    {"prompt": "x" * 100_000},
    {"model": "../../etc/passwd"},
    {"sampler": '{"name": "adaptive", "tolerance": NaN}'},
    {"sampler": '{"name": "adaptive", "name": "adaptive"}'},
    {"sampler": "[" * 60_000},
    {"sampler": "euler"},
    {"sampler[name]": "adaptive", "sampler": "adaptive"},
    {"sampler[name][name]": "adaptive"},
    {"mask": "a text"},
    {"x" * 60_000: "x"},
    {"\0\r\n": "x"},
    {f"field{number}": "x" for number in range(100)},
]
PNG_HEAD = PICTURE[:16]
BAD_FILES: list[dict[str, bytes]] = [
    {"image": b""},
    {"image": b"\xff" * 1000},
    {"image": PICTURE[: len(PICTURE) // 2]},
    {"image": PNG_HEAD + struct.pack(">II", 1 << 30, 1 << 30) + PICTURE[24:]},
    {"image": PNG_HEAD + struct.pack(">II", 60_000, 60_000) + PICTURE[24:]},
    {"image": encoded(gradient(), "gif")},
    {"image": PICTURE, "mask": PICTURE},
    {"image": PICTURE, "mask": encoded(mask(47, 32))},
    {"image": PICTURE, "prompt": b"a file"},
    {"image": PICTURE, "image[]": PICTURE},
    {"mask": encoded(mask())},
]
PART = b'--x\r\nContent-Disposition: form-data; name="'
BAD_FORMS = [
    b"",
    b"--x--\r\n",
    b"--y\r\n\r\n--y--\r\n",
    b"--x\r\n\r\nno name\r\n--x--\r\n",
    PART + b"prompt",
    PART + b'prompt"\r\n\r\nbroken off',
    PART + b'prompt"\r\n\r\n\xff\xfe\r\n--x--\r\n',
    PART + b"p" * 100_000 + b'"\r\n\r\nx\r\n--x--\r\n',
    (PART + b'prompt"\r\n\r\nx\r\n') * 1000 + b"--x--\r\n",
    (PART + b'image"; filename="x"\r\n\r\nx\r\n') * 1000 + b"--x--\r\n",
    PART + b'image"; filename="../../etc/passwd"\r\n\r\nx\r\n--x--\r\n',
    b"--x\r\n" + b"X-Header: x\r\n" * 10_000 + b"\r\nx\r\n--x--\r\n",
    *(body for _, body, _ in BAD_BODIES),
]


def test_row_22_nonsense_in_forms(stage: Stage) -> None:
    """Nonsense in a field, a file or the form itself gets a 4xx that names only fields, and never 500."""
    count = len(BAD_FIELDS) + len(BAD_FILES) + len(BAD_FORMS)
    with unharmed(stage, refused=count) as gateway:
        for fields in BAD_FIELDS:
            refused(gateway.http.post(EDITS, data=SOUND | fields, files={"image": PICTURE}), min(fields, key=len))
        for files in BAD_FILES:
            refused(gateway.http.post(EDITS, data=SOUND, files=files), [*files])
        for form in BAD_FORMS:
            refused(gateway.http.post(EDITS, content=form, headers=FORM), form[:60])


DEEP = b"[" * 100_000 + b"]" * 100_000
BAD_TENSORS = [
    *(body for _, body, _ in BAD_BODIES),
    *(json.dumps(body).encode() for body, _ in test_inference_rest.BAD.values()),
    b'{"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": %s}]}' % DEEP,
    b'{"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [%s]}]}' % (b'"x",' * 99_999 + b'"x"'),
    b'{"inputs": [{"name": "n", "datatype": "INT32", "shape": [1], "data": [NaN]}]}',
    b'{"inputs": [{"name": "n", "datatype": "INT32", "shape": [1e999], "data": [1]}]}',
    b'{"inputs": [%s]}' % (b"{}," * 99_999 + b"{}"),
]
A_PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1]}
BAD_TAILS: list[tuple[dict[str, Any], bytes]] = [
    (A_PROMPT | {"parameters": {"binary_data_size": 4}}, b"\xff\xff\xff\xff"),
    (A_PROMPT | {"parameters": {"binary_data_size": 3}}, b"\0\0\0"),
    (A_PROMPT | {"parameters": {"binary_data_size": 6}}, b"\2\0\0\0\xff\xfe"),
    (A_PROMPT | {"parameters": {"binary_data_size": 4000}}, b"\0" * 4000),
    (A_PROMPT | {"parameters": {"binary_data_size": 10**30}}, b""),
    (A_PROMPT | {"parameters": {"binary_data_size": -1}}, b"x"),
    (A_PROMPT | {"parameters": {"binary_data_size": 5}, "data": ["x"]}, b"\1\0\0\0x"),
    ({"name": "guidance", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}, b"\0\0\xc0\x7f"),
    ({"name": "n", "datatype": "INT32", "shape": [1], "parameters": {"binary_data_size": 5}}, b"\1\0\0\0\0"),
]
ODD_LENGTHS = [b"-1", b"9" * 5000, b"1e3", b"\xb2", b"", b"NaN", b"0x1"]


def test_row_22_nonsense_in_tensors(stage: Stage) -> None:
    count = len(BAD_TENSORS) + len(BAD_TAILS) + len(ODD_LENGTHS)
    with unharmed(stage, refused=count) as gateway:
        for body in BAD_TENSORS:
            refused(gateway.http.post(INFER, content=body, headers=JSON), body[:80])
        for tensor, tail in BAD_TAILS:
            head = json.dumps({"inputs": [tensor]}).encode()
            refused(gateway.http.post(INFER, content=head + tail, headers={LENGTH: str(len(head))}), tensor)
        for length in ODD_LENGTHS:
            refused(gateway.http.post(INFER, content=b"{}", headers=[(LENGTH.encode(), length)]), length)


def test_row_22_nonsense_in_grpc_tensors(stage: Stage) -> None:
    with (
        unharmed(stage, refused=len(test_inference_rpc.BAD)) as gateway,
        grpc.insecure_channel(gateway.grpc_address) as channel,
    ):
        infer = GRPCInferenceServiceStub(channel).ModelInfer
        for name, (request, field) in test_inference_rpc.BAD.items():
            assert refusal(infer, request) == (grpc.StatusCode.INVALID_ARGUMENT, field or None), name
        for method in ("ModelInfer", "ModelMetadata"):  # the others answer any message
            for garbage in (b"\x0a\x02\xff\xfe", b"\x0a\x7f", b"\xff" * 100, b"\x0a" * 10_000, b"\x0b" * 50_000):
                code, _ = refusal(channel.unary_unary(f"{SERVICE}/{method}"), garbage)
                assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), (method, garbage[:4])


def refused(answer: httpx.Response, what: object) -> None:
    """The refusal is short, and in the format of the call."""
    assert 400 <= answer.status_code < 500, (what, answer.status_code, answer.text)
    assert answer.json().keys() == {"error"}, what
    assert len(answer.content) < 1000, what


# --- row 23 ---


@pytest.mark.parametrize(("path", "headers"), [(EDITS, FORM), (INFER, JSON)])
def test_row_23_sixty_megabytes_of_pictures(stage: Stage, path: str, headers: dict[str, str]) -> None:
    """With a length or in chunks, as spaces or as an endless part: refused, and never stored."""
    start = PART + b'image"; filename="x.png"\r\n\r\n' if path == EDITS else b"{"

    def chunks() -> Iterator[bytes]:
        yield start
        for _ in range(60 << 4):
            yield b" " * (1 << 16)

    with unharmed(stage, memory=24, refused=2) as gateway:
        for content in (start + b" " * (60 << 20), chunks()):
            assert gateway.http.post(path, content=content, headers=headers).status_code == 413


@pytest.mark.parametrize(("path", "headers"), [(EDITS, FORM), (INFER, JSON)])
def test_row_23_slow_pictures(stage: Stage, path: str, headers: dict[str, str]) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {headers['Content-Type']}\r\n"
    part = PART.decode() + 'image"; filename="x.png"\r\n\r\n'
    stalled = [
        head,
        f"{head}Content-Length: 999\r\n\r\n",
        f"{head}Content-Length: 999\r\n\r\n{part}",
        f"{head}Transfer-Encoding: chunked\r\n\r\n{len(part):x}\r\n{part}\r\n",
    ]
    with (
        stage.another_gateway(client_timeout_seconds=3) as hasty,
        unharmed(stage, hasty, refused=1) as gateway,
        ThreadPoolExecutor(len(stalled)) as pool,
    ):
        answers = pool.map(lambda sent: status_of(answer_to(gateway, sent.encode())), stalled)
        assert list(answers) == [408] * len(stalled)


# --- no room for uploads ---

MIB = 1 << 20
NO_ROOM = {
    "a full disk": (
        "/usr/bin/env",
        "unshare",
        "-m",
        "sh",
        "-c",
        'mount -t tmpfs -o size=2m none "$TMPDIR"; exec "$@"',
        "sh",
    ),
    "files of 2 MiB at most": ("/bin/sh", "-c", 'ulimit -f 4096; exec "$@"', "sh"),  # in units of 512 bytes
}


@pytest.fixture(params=NO_ROOM)
def cramped(request: pytest.FixtureRequest, stage: Stage, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway whose folder for temporary files has 2 MiB."""
    before = NO_ROOM[request.param]
    if subprocess.run([*before, "true"], capture_output=True, env={"TMPDIR": str(tmp_path)}).returncode:
        pytest.skip("may not mount")
    variables = stage._variables({}) | {"TMPDIR": str(tmp_path)}
    gateway = Gateway("cramped gateway", *before, *PATCHFORGE, "gateway", **variables)
    try:
        gateway.await_ports()
        gateway.await_ready()
        yield gateway
    finally:
        gateway.close()
        print(gateway.transcript())


def test_an_upload_for_which_there_is_no_room(cramped: Gateway, stage: Stage) -> None:
    """A typed error, again and again; nothing is stored, and what fits is served before and after.

    Files of up to 1 MiB stay in memory.
    """
    fits, large = (with_chunk(PICTURE, b"tEXt", bytes(size)) for size in (MIB + MIB // 2, 3 * MIB))

    def edit(picture: bytes) -> httpx.Response:
        return cramped.http.post(EDITS, data=SOUND, files={"image": picture})

    assert edit(fits).status_code == 200
    stage.at_rest()
    before = stage.stored()
    for _ in range(3):
        answer = edit(large)
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["message"] == "the server has no room for uploads"
    assert stage.stored() == before
    reasons = {line["reason"] for line in cramped.log if line["event"].startswith("an upload cannot be stored")}
    assert reasons <= {"No space left on device", "File too large"}
    assert reasons
    assert not cramped.stray
    assert edit(fits).status_code == 200, "what the others took is free again"
    assert cramped.ended(cramped.submit(APPLE))["status"] == "completed"
