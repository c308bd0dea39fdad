"""`patchforge serve`: the gateway here, a worker and the queue server as its children, kept alive."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack

import structlog

from service.embedded import EmbeddedServer, EmbeddedServerError
from service.gateway.app import serve_gateway
from service.settings import Settings
from service.threads import in_thread

log = structlog.get_logger()

RESTART_SECONDS = (0.5, 1, 2, 5, 10)
LOOK_SECONDS = 0.5  # between looks at whether the queue server still runs


async def serve(settings: Settings) -> None:
    """Run everything until SIGTERM or SIGINT; without a queue server to use, start an embedded one."""
    with ExitStack() as stack:
        url, server = settings.redis_url, None
        if url is None:
            server = stack.enter_context(EmbeddedServer(settings.data_dir))
            url = server.url
            log.info("embedded queue server ready", data=str(settings.data_dir / "queue"))
        async with AsyncExitStack() as processes:
            if server is not None:
                await processes.enter_async_context(_kept_running(server))
            await processes.enter_async_context(_WorkerProcess(settings, url))
            await serve_gateway(settings.model_copy(update={"redis_url": url}))


@contextlib.asynccontextmanager
async def _kept_running(server: EmbeddedServer) -> AsyncIterator[None]:
    keeper = asyncio.create_task(_keep_running(server))
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


async def _keep_running(server: EmbeddedServer) -> None:
    """Start the server again whenever it ends: its port and its log stay, so everyone finds their jobs again."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if server.running:
            continue
        log.error("the queue server ended; starting it again")
        server.stop()
        try:
            # Off the loop, for a long log takes a while to load. The thread is one of the loop's own, which live on.
            await in_thread(server.start)
        except EmbeddedServerError as error:
            log.error("the queue server did not start", error=error.message)


class _WorkerProcess:
    """Keeps one worker process alive, with growing pauses if it keeps dying."""

    def __init__(self, settings: Settings, redis_url: str) -> None:
        self._environment = os.environ | {"REDIS_URL": redis_url, "PATCHFORGE_REDIS_URL": redis_url}
        self._grace = settings.stop_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._keeper = asyncio.create_task(self._keep())

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
        deaths = 0
        while True:
            # A session of its own: Ctrl-C reaches the gateway, which lets the worker drain.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "service.cli",
                "worker",
                "--parent",
                str(os.getpid()),
                env=self._environment,
                start_new_session=True,
            )
            code = await self._process.wait()
            pause = RESTART_SECONDS[min(deaths, len(RESTART_SECONDS) - 1)]
            deaths += 1
            log.error("the worker ended; starting another", code=code, seconds=pause)
            await asyncio.sleep(pause)
