"""Settings, read from ``PATCHFORGE_…`` environment variables."""

from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Every knob of gateway and worker; defaults suit one laptop, bound to loopback."""

    model_config = SettingsConfigDict(env_prefix="PATCHFORGE_", extra="ignore")

    host: str = Field("127.0.0.1", description="Address the HTTP and gRPC servers bind to.")
    http_port: int = Field(8000, ge=0, le=65535)
    grpc_port: int = Field(50051, ge=0, le=65535)
    worker_metrics_port: int = Field(9100, ge=0, le=65535, description="Prometheus port of a worker; 0 = off.")
    data_dir: Path = Field(Path(".patchforge"), description="Where the embedded queue server keeps its data.")
    bundle_dir: Path = Field(Path("model/bundles"), description="Folder whose subfolders are model bundles.")
    models: list[str] = Field([], description="Bundles to serve, by name; empty = all found.")
    redis_url: str | None = Field(
        None,
        validation_alias=AliasChoices("PATCHFORGE_REDIS_URL", "REDIS_URL"),
        description="Queue server; left out, `patchforge serve` starts an embedded one.",
    )
    max_waiting: int = Field(256, ge=1, description="Waiting jobs before submits are refused with 503.")
    max_body_bytes: int = Field(1 << 20, ge=1024)
    result_ttl_seconds: int = Field(3600, ge=1, description="How long finished jobs, pictures and events are kept.")
    idempotency_ttl_seconds: int = Field(86400, ge=1)
    max_attempts: int = Field(3, ge=1, description="Starts before a job is dead-lettered.")
    claim_idle_seconds: float = Field(30.0, gt=0, description="Silence after which a worker's jobs are reclaimed.")
    sse_ping_seconds: float = Field(15.0, gt=0)
    client_timeout_seconds: float = Field(
        30.0, gt=0, description="How long a client may take to send a request, or to read one piece of a stream."
    )
    drain_seconds: int = Field(10, ge=0, description="How long a stopping gateway or worker lets what runs finish.")
    max_running: int = Field(16, ge=1, description="Jobs a worker keeps in flight.")
    patch_budget: int = Field(4096, ge=1, description="Patches a worker packs into one evaluation.")
    preview_interval_seconds: float = Field(0.1, ge=0, description="Least time between previews of one picture.")
    threads: int | None = Field(None, ge=1, description="CPU threads of a worker; default: every core.")
    log_level: str = "INFO"
    log_json: bool = False
