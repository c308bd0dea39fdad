"""`patchforge serve`: runs the gateway here, and a worker and the queue server as children that it restarts.

A worker that was running is replaced, whatever ended it. A worker that cannot start says why, and ends everything,
because the next worker would fail in the same way. So does one that is killed again and again before it can say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, ExitStack

import structlog

from patchforge.service.embedded import EmbeddedServer, EmbeddedServerError
from patchforge.service.errors import PatchforgeError
from patchforge.service.gateway.app import serve_gateway
from patchforge.service.settings import Settings
from patchforge.service.threads import in_thread

log = structlog.get_logger()

RESTART_SECONDS = (0.5, 1, 2, 5, 10)
MAX_FALSE_STARTS = 5  # workers in a row that ended without a word before they were ready
MAX_REASON = 4096  # bytes; the worker writes no more
STARTED = b"\0"  # what a worker writes when it is ready
CHECK_SECONDS = 0.5  # between checks that the queue server is running


class WorkerCannotStart(PatchforgeError):
    """The worker needs something that is missing or broken; the message says what."""

    code = "worker_cannot_start"


async def serve(settings: Settings) -> None:
    """Run everything until SIGTERM or SIGINT; start an embedded queue server if the settings name none.

    Raises:
        WorkerCannotStart: the worker cannot start; everything else has been stopped.
        EmbeddedServerError: the embedded queue server did not start.
    """
    with ExitStack() as stack:
        server = None
        if not settings.queue_urls:
            server = stack.enter_context(EmbeddedServer(settings.data_dir))
            settings = settings.model_copy(update={"redis_url": server.url})
            log.info("embedded queue server ready", data=str(settings.data_dir / "queue"))
        async with AsyncExitStack() as processes:
            if server is not None:
                await processes.enter_async_context(_keeping_alive(server))
            keeper = await processes.enter_async_context(_WorkerProcess(settings))
            if "metrics_of_workers" not in settings.model_fields_set:
                settings = settings.model_copy(update={"metrics_of_workers": True})  # nobody scrapes its worker
            await _serve_while(keeper, serve_gateway(settings))


async def _serve_while(keeper: asyncio.Task[None], serving: Coroutine[None, None, None]) -> None:
    """Serve until this or the keeper ends, and raise the error of the one that ended first."""
    gateway = asyncio.create_task(serving)
    try:
        await asyncio.wait({gateway, keeper}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gateway.cancel()  # starts its orderly shutdown; no effect if it has ended
        await asyncio.wait({gateway})
    for task in (keeper, gateway):
        if task.done() and not task.cancelled():
            task.result()


@contextlib.asynccontextmanager
async def _keeping_alive(server: EmbeddedServer) -> AsyncIterator[None]:
    keeper = asyncio.create_task(_keep_running(server))
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


async def _keep_running(server: EmbeddedServer) -> None:
    """Restart the server whenever it ends, with the same port and log, so that no job is lost."""
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        if server.running:
            continue
        log.error("the queue server ended; starting it again")
        server.stop()
        try:
            # In a thread, because a long log loads slowly; the threads of the loop do not end before the server.
            await in_thread(server.start)
        except EmbeddedServerError as error:
            log.error("the queue server did not start", error=error.message)


class _WorkerProcess:
    """Keeps one worker process alive, with growing pauses if it keeps failing."""

    def __init__(self, settings: Settings) -> None:
        self._environment = dict(os.environ)
        if settings.redis_url is not None:
            self._environment |= {"REDIS_URL": settings.redis_url, "PATCHFORGE_REDIS_URL": settings.redis_url}
        self._grace = settings.stop_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> asyncio.Task[None]:
        """Returns the task that keeps the worker alive. It ends only with WorkerCannotStart."""
        self._keeper = asyncio.create_task(self._keep())
        return self._keeper

    async def __aexit__(self, *reason: object) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._grace)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _keep(self) -> None:
        failures = false_starts = 0
        while True:
            code, reason = await self._run_one()
            false_starts = 0 if reason == STARTED else false_starts + 1
            if reason not in (b"", STARTED):
                raise WorkerCannotStart(f"the worker cannot start: {reason.decode(errors='replace')}")
            if false_starts == MAX_FALSE_STARTS:
                raise WorkerCannotStart(f"{false_starts} workers ended before they were ready, {_describe_end(code)}")
            pause = RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)]
            failures += 1
            log.error("the worker ended; starting another", code=code, seconds=pause)
            await asyncio.sleep(pause)

    async def _run_one(self) -> tuple[int, bytes]:
        """Run one worker to its end. Returns the exit status, and why it could not start; STARTED if it could."""
        # -P: otherwise Python would look for modules in the working directory first.
        command = [sys.executable, "-P", "-m", "patchforge", "worker", "--parent", str(os.getpid())]
        ours, its = os.pipe()
        try:
            try:
                # A session of its own: Ctrl-C reaches the gateway, which lets the worker drain.
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    *("--report-to", str(its)),
                    pass_fds=(its,),
                    env=self._environment,
                    start_new_session=True,
                )
            finally:
                os.close(its)
            code = await self._process.wait()
            os.set_blocking(ours, False)  # the worker's own children may still hold the other end
            try:
                reason = os.read(ours, MAX_REASON)
            except BlockingIOError:
                reason = b""
        finally:
            os.close(ours)
        return code, reason


def _describe_end(code: int) -> str:
    if code == -signal.SIGKILL:
        return "the last one killed: is there enough memory? See docs/hardware.md"
    return f"the last one by signal {-code}" if code < 0 else f"the last one with status {code}"
