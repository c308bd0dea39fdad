"""FastAPI dependencies of the HTTP operations. All are async: FastAPI runs plain functions in a thread."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from patchforge.service.gateway.jobs import JobService
from patchforge.service.gateway.metrics import GatewayMetrics
from patchforge.service.settings import Settings


async def _service(request: Request) -> JobService:
    service: JobService = request.app.state.service
    return service


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _metrics(request: Request) -> GatewayMetrics:
    metrics: GatewayMetrics = request.app.state.metrics
    return metrics


async def _tenant(request: Request) -> str | None:
    tenant: str | None = request.state.tenant
    return tenant


Service = Annotated[JobService, Depends(_service)]
AppSettings = Annotated[Settings, Depends(_settings)]
Metrics = Annotated[GatewayMetrics, Depends(_metrics)]
Tenant = Annotated[str | None, Depends(_tenant)]
"""The name of the caller's API key, or None without keys. Not for operations that are open: see `auth`."""
