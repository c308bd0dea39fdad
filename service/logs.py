"""Structured logs on stderr: text for people by default, JSON for machines.

Logging never stops or delays a service: a thread of its own writes the lines. Lines that stderr does not take (its disk
is full, its reader is gone or does not read) are dropped and counted.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

import structlog
from prometheus_client import Counter

from patchforge.service.settings import Settings

MAX_PENDING_BYTES = 1 << 20
"""What may wait for a slow reader; later lines are dropped."""
FLUSH_SECONDS = 2.0
STDERR = 2
DROPPED = Counter(
    "patchforge_log_lines_dropped",
    "Log lines that stderr did not take: see its disk or reader.",
    ("process",),
    registry=None,
)


class LogStream:
    """Writes whole lines to a file descriptor in a thread of its own."""

    def __init__(self, descriptor: int, count: Callable[[int], None], describe_loss: Callable[[int], str]) -> None:
        """`count` is called with the number of lines dropped; `describe_loss` makes the line that reports them."""
        self._descriptor = descriptor
        self._count = count
        self._describe_loss = describe_loss
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0  # not reported yet
        self._torn = False  # the last line was not written to its end
        self._writing = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="logs", daemon=True).start()

    def write(self, text: str) -> int:
        """Queues lines for the thread; drops them if too many wait already."""
        line = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._bytes + len(line) > MAX_PENDING_BYTES:
                self._drop()
            else:
                self._lines.append(line)
                self._bytes += len(line)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Does nothing: who logs does not wait. See `drain`."""

    def drain(self, seconds: float = FLUSH_SECONDS) -> None:
        """Waits until all lines are written or dropped, but not longer than that."""
        give_up = time.monotonic() + seconds
        with self._changed:
            while (self._lines or self._writing) and (rest := give_up - time.monotonic()) > 0:
                self._changed.wait(rest)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                while not self._lines:
                    self._changed.wait()
                line, self._writing = self._lines.popleft(), True
                self._bytes -= len(line)
                dropped = self._dropped
            reported = not dropped or self._put(self._describe_loss(dropped).encode())
            written = reported and self._put(line)
            with self._changed:
                self._dropped -= dropped if reported else 0
                if not written:
                    self._drop()

    def _drop(self) -> None:
        self._dropped += 1
        self._count(1)

    def _put(self, line: bytes) -> bool:
        """Writes a line at once, because processes share a stream. Returns whether all of it was written."""
        rest = b"\n" + line if self._torn else line
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                    self._torn = bool(rest)
                except BlockingIOError:  # someone who shares the stream has set it to non-blocking
                    poll = select.poll()
                    poll.register(self._descriptor, select.POLLOUT)
                    poll.poll()
        except OSError:
            return False
        return True


_stream: LogStream | None = None


def configure_logs(settings: Settings, process: str) -> None:
    """Set up structlog and the logs of libraries for this process; every line contains `process`."""
    global _stream
    level = logging.getLevelNamesMapping()[settings.log_level]
    renderer: structlog.typing.Processor = structlog.dev.ConsoleRenderer(colors=os.isatty(STDERR))
    if settings.log_json:
        renderer = structlog.processors.JSONRenderer()

    def name_process(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**event, "process": process}  # no context variable: threads of libraries log too

    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        name_process,
    ]

    def describe_loss(lines: int) -> str:
        event: structlog.typing.EventDict = {"event": "log lines were dropped", "lines": lines}
        for processor in (*processors, renderer):
            event = processor(None, "warning", event)  # type: ignore[assignment]
        return f"{event}\n"

    dropped = DROPPED.labels(process)
    _stream = LogStream(STDERR, dropped.inc, describe_loss)
    atexit.register(_stream.drain)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(_stream),  # type: ignore[arg-type]
    )
    _route_libraries(_stream, processors, renderer, level)


def drain_logs() -> None:
    """Wait, shortly, until what was logged is written: for what must come after it on stderr."""
    if _stream is not None:
        _stream.drain()


def _route_libraries(
    stream: LogStream,
    processors: list[structlog.typing.Processor],
    renderer: structlog.typing.Processor,
    level: int,
) -> None:
    """Write warnings and errors of libraries as lines of our own logs: by themselves they would wait for stderr."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=processors,
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)
