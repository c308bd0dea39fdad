"""`patchforge serve`: the gateway here, a worker and the queue server as its children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from contextlib import AsyncExitStack, ExitStack

import structlog

from service.embedded import EmbeddedServer
from service.gateway.app import serve_gateway
from service.settings import Settings

log = structlog.get_logger()

RESTART_SECONDS = (0.5, 1, 2, 5, 10)


async def serve(settings: Settings) -> None:
    """Run everything until SIGTERM or SIGINT; without a queue server to use, start an embedded one."""
    with ExitStack() as stack:
        url = settings.redis_url
        if url is None:
            url = stack.enter_context(EmbeddedServer(settings.data_dir)).url
            log.info("embedded queue server ready", data=str(settings.data_dir / "queue"))
        async with AsyncExitStack() as processes:
            await processes.enter_async_context(_WorkerProcess(settings, url))
            await serve_gateway(settings.model_copy(update={"redis_url": url}))


class _WorkerProcess:
    """Keeps one worker process alive, with growing pauses if it keeps dying."""

    def __init__(self, settings: Settings, redis_url: str) -> None:
        self._environment = os.environ | {"REDIS_URL": redis_url, "PATCHFORGE_REDIS_URL": redis_url}
        self._grace = settings.drain_seconds + 10
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
