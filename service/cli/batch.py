"""`patchforge batch`: draws a file of requests on a server, in the background, and fetches what became of them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from patchforge.service.cli.errors import show_error, typed_errors
from patchforge.service.cli.sample import Advance, show_progress
from patchforge.service.client import Client, Unreachable
from patchforge.service.client.wire import Drawn
from patchforge.service.errors import InvalidRequest, JobFailed, NotFound, NotReady, QueueFull, RateLimited, Unavailable
from patchforge.service.messages.batches import Batch, BatchResult

INTERRUPTED = 130
POLL_SECONDS = 1.0
LONGEST_WAIT_SECONDS, GIVE_UP_SECONDS = 30.0, 600.0
BUSY = QueueFull, RateLimited, Unavailable, Unreachable
"""What passes: a run of hours outlives a full server, and one that restarts."""
UNDONE = ("batch_expired", "batch_cancelled", "result_expired")
"""Errors of requests that nobody tried, or whose pictures are gone: they are sent again."""

T = TypeVar("T")


def batch(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON lines, each with custom_id, url and body: see docs/api.md.", exists=True, dir_okay=False
        ),
    ],
    server: Annotated[str, typer.Option(help="URL of the server; PATCHFORGE_API_KEY holds its API key.")],
    out: Annotated[
        Path, typer.Option(help="JSON lines with what became of each; a run that was stopped goes on there.")
    ] = Path("out.jsonl"),
    endpoint: Annotated[
        str | None, typer.Option(help="Endpoint of lines without a url, such as /v1/images/generations.")
    ] = None,
    part: Annotated[
        int, typer.Option(min=1, max=50_000, help="Lines that the server has at a time, with their pictures.")
    ] = 500,
) -> None:
    """Draw a file of requests at low priority: a line in --out for each, and pictures in a folder beside it."""
    with typed_errors():
        work = BatchRun(file, out, endpoint, part)
        try:
            with (
                Client(server, api_key=os.environ.get("PATCHFORGE_API_KEY") or None) as client,
                show_progress(len(work.lines), "requests") as advance,
            ):
                work.run(client, advance)
        except KeyboardInterrupt:
            there = f"{len(work.done)} of {len(work.lines)} results"
            show_error(f"stopped with {there}; the server goes on, and the same command fetches the rest")
            raise typer.Exit(INTERRUPTED) from None
        failed = sum(1 for status in work.done.values() if status != "completed")
        print(f"{out}  has {len(work.done)} results" + (f"; {failed} of them failed" if failed else ""))


class BatchRun:
    """A file of requests, and how far it has come. What is in `out` is done; `out`.batch names the batch that runs.

    Kill it at any moment: a batch that was begun is found again, by that file or by the key that its lines make.
    """

    def __init__(self, file: Path, out: Path, endpoint: str | None, part: int) -> None:
        """Reads what earlier runs have done.

        Raises:
            InvalidRequest: `file` has no requests, or `out` belongs to another file.
        """
        content = file.read_bytes()
        self.lines = {number: line for number, line in enumerate(content.split(b"\n"), 1) if line.strip()}
        """By number in the file, from 1."""
        if not self.lines:
            raise InvalidRequest(f"{file} has no requests")
        self.done: dict[int, str] = {}
        """Status by number."""
        self._file, self._out, self._endpoint, self._part = file, out, endpoint, part
        self._begun = out.with_name(f"{out.name}.batch")
        self._pictures = out.with_name(f"{out.stem}-pictures")
        self._read_done()

    def run(self, client: Client, advance: Advance) -> None:
        """Draw what is missing, a part at a time.

        Raises:
            JobFailed: somebody cancelled the batch.
            PatchforgeError: the server refuses, or stays away.
        """
        client.models()  # a wrong address or key shows at once
        advance(len(self.done))
        while missing := [number for number in self.lines if number not in self.done]:
            batch, numbers = self._resume(client) or self._begin(client, missing[: self._part])
            before = len(self.done)
            while not batch.ended:
                counts = batch.request_counts
                advance(min(len(self.lines), before + counts.completed + counts.failed))
                time.sleep(POLL_SECONDS)
                batch = patiently(lambda found=batch.id: client.batch(found))  # type: ignore[misc]
            patiently(lambda ended=batch, sent=numbers: self._fetch(client, ended, sent))  # type: ignore[misc]
            patiently(lambda found=batch.id: _delete(client, found))  # type: ignore[misc]
            self._begun.unlink()
            advance(len(self.done))
            if batch.status == "cancelled" and any(number not in self.done for number in numbers):
                raise JobFailed("somebody cancelled the batch; the same command draws the rest")

    def _begin(self, client: Client, numbers: list[int]) -> tuple[Batch, list[int]]:
        """Send these lines. If the last run sent them and was killed before it noted that, the key finds the batch."""
        content = b"\n".join(self.lines[number] for number in numbers)
        key = sha256(f"{self._out.resolve()}\0{self._endpoint}\0".encode() + content).hexdigest()
        batch = patiently(lambda: client.create_batch(content, endpoint=self._endpoint, idempotency_key=key))
        beside = self._begun.with_name(f"{self._begun.name}.new")
        beside.write_text(json.dumps({"batch": batch.id, "lines": numbers}))
        beside.replace(self._begun)
        return batch, numbers

    def _resume(self, client: Client) -> tuple[Batch, list[int]] | None:
        """The batch that an earlier run has begun, if it is still there."""
        if not self._begun.exists():
            return None
        noted = json.loads(self._begun.read_text())
        try:
            return patiently(lambda: client.batch(noted["batch"])), noted["lines"]
        except NotFound:
            self._begun.unlink()
            return None

    def _fetch(self, client: Client, batch: Batch, numbers: list[int]) -> None:
        """Write down all results that are not there yet."""
        with self._out.open("ab") as results:
            for result in client.batch_results(batch):
                number = numbers[int(result.id.rpartition("_")[2])]
                if number in self.done or (result.error is not None and result.error.code in UNDONE):
                    continue
                try:
                    outcome = self._keep(client, number, result)
                except (NotFound, NotReady):  # somebody deleted the picture
                    continue
                results.write(json.dumps(outcome).encode() + b"\n")
                results.flush()
                self.done[number] = outcome["status"]

    def _keep(self, client: Client, number: int, result: BatchResult) -> dict[str, Any]:
        """Save the pictures of a result, and return its line."""
        line: dict[str, Any] = {"line": number, "custom_id": result.custom_id}
        try:
            pictures = client.batch_pictures(result)
        except JobFailed as error:
            return line | {"status": "failed", "error": {"code": error.code, "message": error.message}}
        self._pictures.mkdir(parents=True, exist_ok=True)
        paths = []
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", result.custom_id or "")[:60].strip(".-")
        for index, picture in enumerate(pictures):
            path = self._pictures / f"{number:06d}-{name}-{index}.{picture.content_type.rpartition('/')[2]}"
            picture.save(path)
            paths.append(str(path.relative_to(self._out.parent)))
        report = Drawn.by(result).report.model_dump(mode="json")
        return line | {"status": "completed", "paths": paths, "report": report}

    def _read_done(self) -> None:
        """Read the results that are there; drop a last line that was cut off."""
        if not self._out.exists():
            return
        content = self._out.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self._out, len(whole))
        for text in whole.splitlines():
            try:
                line = json.loads(text)
                number, custom_id, status = line["line"], line["custom_id"], line["status"]
            except (ValueError, KeyError, TypeError):
                raise InvalidRequest(f"{self._out} has other things than results: choose another --out") from None
            if custom_id != _custom_id(self.lines.get(number, b"")):
                raise InvalidRequest(
                    f"{self._out} has the results of another file than {self._file}: choose another --out"
                )
            self.done[number] = status


def _custom_id(line: bytes) -> str | None:
    """The custom_id of a line that may be wrong in any way, as the server finds it."""
    try:
        found = json.loads(line)["custom_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _delete(client: Client, batch_id: str) -> None:
    with suppress(NotFound):  # a repeated call
        client.delete_batch(batch_id)


def patiently(call: Callable[[], T]) -> T:
    """Call, and again while the server is busy or away, but not for ever."""
    wait, began = 1.0, time.monotonic()
    while True:
        try:
            return call()
        except BUSY as error:
            if time.monotonic() - began > GIVE_UP_SECONDS:
                raise
            time.sleep(error.retry_after or wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
