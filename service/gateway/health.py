"""gRPC's standard health service, as gRPC's own implementation is not: out of reach of those who watch it.

The stock one tells all watchers of a change under one lock, so that a watcher who does not read stops the gateway from
ever changing its health again; and its watches outlast everything else when the server stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One answer for the server as a whole and for each of ``services``."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = {"", *services}
        self._status = Status.NOT_SERVING
        self._draining = False
        self._changed = asyncio.Event()

    def report(self, *, serving: bool) -> None:
        """Tells watchers, if this is news."""
        status = Status.SERVING if serving and not self._draining else Status.NOT_SERVING
        if status != self._status:
            self._status = status
            self._wake()

    def drain(self) -> None:
        """Not serving, for good; watches end once their watchers have heard it."""
        self._draining = True
        self._status = Status.NOT_SERVING
        self._wake()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return Status(status=self._status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        known, told = request.service in self._services, None
        while True:
            changed, status = self._changed, self._status if known else Status.SERVICE_UNKNOWN
            if status != told:
                await context.write(Status(status=status))
                told = status
                continue  # it may have changed while this was being sent
            if self._draining:
                return
            await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
