"""Files of requests to send, and ways to read what came of them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from tests.patience import PATIENCE

GENERATIONS = "/v1/images/generations"
JSON_LINES = {"Content-Type": "application/jsonl"}


def drawn(custom_id: str, prompt: str = "a red apple", **body: Any) -> dict[str, Any]:
    """A line for the Images API."""
    return {"custom_id": custom_id, "method": "POST", "url": GENERATIONS, "body": {"prompt": prompt, **body}}


def native(custom_id: str, **body: Any) -> dict[str, Any]:
    """A line for our own API."""
    return {"custom_id": custom_id, "url": "/v1/jobs", "body": {"prompt": "a red apple", **body}}


def jsonl(*lines: Any) -> bytes:
    """A file of requests; lines that are bytes are taken as they are."""
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


async def begin(http: httpx.AsyncClient, *lines: Any, **query: str) -> dict[str, Any]:
    """Sends a file as a batch."""
    reply = await http.post("/v1/batches", content=jsonl(*lines), headers=JSON_LINES, params=query)
    assert reply.status_code == 200, reply.text
    batch: dict[str, Any] = reply.json()
    return batch


async def until(http: httpx.AsyncClient, batch: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """Waits until a batch has these values; by default, until it has ended."""
    async with asyncio.timeout(PATIENCE):
        while True:
            reply = await http.get(f"/v1/batches/{batch['id']}")
            assert reply.status_code == 200, reply.text
            now: dict[str, Any] = reply.json()
            if wanted.items() <= now.items() if wanted else now["status"] in ("completed", "cancelled", "expired"):
                return now
            await asyncio.sleep(0.05)


async def waiting_for(http: httpx.AsyncClient, batch: dict[str, Any], reason: str) -> None:
    """Waits until a batch says that it waits for this."""
    async with asyncio.timeout(PATIENCE):
        while True:
            now = await until(http, batch, status="in_progress")
            if reason in str(now["patchforge"]["waiting_for"]):
                return
            await asyncio.sleep(0.02)


async def results(http: httpx.AsyncClient, batch: dict[str, Any], kind: str = "output") -> dict[str, dict[str, Any]]:
    """Reads the results of a batch, by custom_id."""
    file = batch[f"{kind}_file_id"]
    if file is None:
        return {}
    reply = await http.get(f"/v1/files/{file}/content")
    assert reply.status_code == 200, reply.text
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}
