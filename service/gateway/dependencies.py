"""What the HTTP operations ask of the application they run in; async, for FastAPI sends plain functions to a thread."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from service.gateway.jobs import JobService
from service.metrics import GatewayMetrics
from service.settings import Settings


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
Knobs = Annotated[Settings, Depends(_settings)]
Metrics = Annotated[GatewayMetrics, Depends(_metrics)]
Tenant = Annotated[str | None, Depends(_tenant)]
"""Who calls, where keys are asked for. Only for operations that are not open: see `service.gateway.auth`."""
