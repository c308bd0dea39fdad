"""Starts the real processes that a measurement is about, and ends them with it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from patchforge.service.bench.raw_http import Connection
from patchforge.service.embedded import tied_to_parent
from patchforge.service.errors import Unavailable

READY_SECONDS = 180.0  # on a busy machine
Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@asynccontextmanager
async def processes(folder: Path, settings: Mapping[str, object]) -> AsyncIterator[Start]:
    """Yields `start(*arguments)`, which runs a Python module with these settings. All end with the block.

    Their standard error goes to `folder`, to a file named after the last argument. Settings of the caller's own
    environment do not count.
    """
    async with AsyncExitStack() as stack:

        async def start(*arguments: str) -> asyncio.subprocess.Process:
            command = [sys.executable, "-P", "-m", *arguments]
            return await launch(stack, command, folder / f"{arguments[-1]}.log", settings)

        yield start


async def launch(
    stack: AsyncExitStack, command: Sequence[str], log: Path, settings: Mapping[str, object]
) -> asyncio.subprocess.Process:
    """Runs a command, whose first word is a path, with these settings. The process ends with `stack`."""
    ours = {f"PATCHFORGE_{name}": str(value) for name, value in settings.items()}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PATCHFORGE_", "REDIS_URL"))} | ours
    process = await asyncio.create_subprocess_exec(
        *tied_to_parent([*command], signal.SIGKILL),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stack.enter_context(log.open("wb")),
        start_new_session=True,
    )
    stack.push_async_callback(_stop_process, process)
    return process


async def wait_until_ready(url: str, path: str = "/readyz") -> None:
    """Waits until the gateway at `url` is ready for requests; with `/healthz`, only until it runs.

    Raises:
        Unavailable: it was not ready in time.
    """
    give_up = time.monotonic() + READY_SECONDS
    while time.monotonic() < give_up:
        with suppress(OSError, EOFError):
            async with Connection(url) as connection:
                if (await connection.get(path))[0] == 200:
                    return
        await asyncio.sleep(0.1)
    raise Unavailable(f"the gateway was not ready in {READY_SECONDS:.0f} s")


async def _stop_process(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    with suppress(TimeoutError):
        async with asyncio.timeout(15):
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()
