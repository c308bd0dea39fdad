"""gRPC's standard health service, written so that a slow watcher cannot block it.

gRPC's own implementation sends changes to all watchers under one lock: one watcher that does not read stops all later
changes. Its watches also delay the server's shutdown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Reports one status for the whole server and for each of `services`."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = {"", *services}
        self._status = Status.NOT_SERVING
        self._draining = False
        self._changed = asyncio.Event()

    def report(self, *, serving: bool) -> None:
        """Sets the status, and wakes the watchers if it changed."""
        status = Status.SERVING if serving and not self._draining else Status.NOT_SERVING
        if status != self._status:
            self._status = status
            self._wake()

    def drain(self) -> None:
        """Sets NOT_SERVING for good. Each watch ends after it has sent this."""
        self._draining = True
        self._status = Status.NOT_SERVING
        self._wake()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return Status(status=self._status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        known, sent = request.service in self._services, None
        while True:
            changed, status = self._changed, self._status if known else Status.SERVICE_UNKNOWN
            if status != sent:
                await context.write(Status(status=status))
                sent = status
                continue  # it may have changed during the write
            if self._draining:
                return
            await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
