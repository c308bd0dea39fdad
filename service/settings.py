"""Settings, read from ``PATCHFORGE_…`` environment variables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

KEY_NAME = r"[A-Za-z0-9._-]{1,64}"
ApiKey = Annotated[str, Field(pattern=f"^{KEY_NAME}:[0-9a-f]{{64}}$")]


class Settings(BaseSettings):
    """Every knob of gateway and worker; defaults suit one laptop, bound to loopback."""

    # Errors do not repeat what was set: it may be a key in the wrong place, or a URL with a password. What is empty
    # counts as not set: Compose, for one, can hardly pass a variable on only if it is.
    model_config = SettingsConfigDict(
        env_prefix="PATCHFORGE_", extra="ignore", hide_input_in_errors=True, env_ignore_empty=True
    )

    host: str = Field("127.0.0.1", description="Address the HTTP and gRPC servers bind to.")
    http_port: int = Field(8000, ge=0, le=65535, description="REST, OpenAI API and playground; 0 = any free one.")
    grpc_port: int = Field(50051, ge=0, le=65535, description="0 = any free one.")
    worker_metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port of a worker; 0 = off.")
    data_dir: Path = Field(Path(".patchforge"), description="Where the embedded queue server keeps its data.")
    bundle_dir: Path = Field(Path("model/bundles"), description="Folder whose subfolders are model bundles.")
    models: Annotated[list[str], NoDecode] = Field(
        [], description="Bundles to serve, by name, with commas between; empty = all found."
    )
    redis_url: str | None = Field(
        None,
        validation_alias=AliasChoices("PATCHFORGE_REDIS_URL", "REDIS_URL"),
        description="Queue server, its password percent-encoded; left out, `patchforge serve` starts an embedded one.",
    )
    api_keys: Annotated[list[ApiKey], NoDecode] = Field(
        [],
        repr=False,
        description="Who may call, as name:sha256 from `patchforge hash-key`, with commas between; empty = everyone.",
    )
    tls_cert: Path | None = Field(None, description="PEM certificate chain for HTTPS and gRPC; empty = no TLS.")
    tls_key: Path | None = Field(None, description="PEM private key that belongs to it, without a password.")
    max_waiting: int = Field(256, ge=1, description="Waiting jobs before submits are refused with 503.")
    rate_limit: int = Field(0, ge=0, description="Pictures a minute one API key may ask for, else 429; 0 = no limit.")
    rate_burst: int = Field(20, ge=1, description="Pictures it may ask for at once after a quiet time.")
    max_in_flight: int = Field(
        0, ge=0, description="Jobs one API key may have waiting and running, else 429; 0 = no limit."
    )
    cors_origins: Annotated[list[str], NoDecode] = Field(
        [], description="Origins whose pages may call from a browser, with commas between; `*` = any; empty = none."
    )
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Of an HTTP body; more is refused.")
    max_upload_bytes: int = Field(
        8 << 20, ge=1024, description="Of a body that may carry pictures, and of a gRPC message; more is refused."
    )
    result_ttl_seconds: int = Field(3600, ge=1, description="How long finished jobs, pictures and events are kept.")
    idempotency_ttl_seconds: int = Field(86400, ge=1, description="How long an Idempotency-Key is remembered.")
    max_attempts: int = Field(3, ge=1, description="Starts before a job is dead-lettered.")
    claim_idle_seconds: float = Field(30.0, gt=0, description="Silence after which a worker's jobs are reclaimed.")
    sse_ping_seconds: float = Field(10.0, gt=0, description="Longest silence on an idle stream, SSE or gRPC.")
    client_timeout_seconds: float = Field(
        30.0, gt=0, description="How long a client may take to send a request, or to read one piece of a stream."
    )
    drain_seconds: int = Field(10, ge=0, description="How long a stopping gateway or worker lets what runs finish.")
    max_running: int = Field(16, ge=1, description="Jobs a worker keeps in flight.")
    patch_budget: int | None = Field(
        None, ge=1, description="Patches a worker packs into one evaluation; default: profiled at its start."
    )
    cache_bytes: int = Field(
        2 << 30, ge=1, description="Keys and values a worker keeps for running pictures; beyond that, some wait."
    )
    preview_interval_seconds: float = Field(0.1, ge=0, description="Least time between previews of one picture.")
    preview_share: float = Field(0.1, gt=0, description="Part of a worker's time that all previews may take.")
    compile: bool = Field(
        False, description="Compile parts of the networks with torch.compile: meant for GPUs; needs a C++ compiler."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a worker; default: every core.")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")
    log_json: bool = Field(False, description="One JSON object a line instead of lines for people.")

    @property
    def stop_seconds(self) -> int:
        """How long a gateway or worker may take from SIGTERM to its end, before whoever waits sends SIGKILL."""
        return self.drain_seconds + 10

    @field_validator("redis_url")
    @classmethod
    def _redis_can_read_it(cls, url: str | None) -> str | None:
        """Its client would raise in the middle of starting, with what it took for a port: part of a password."""
        from redis.connection import parse_url

        if url is not None:
            try:
                parse_url(url)
            except ValueError:
                raise ValueError(
                    "must be redis://[[user]:password@]host[:port][/number], or rediss:// or unix://; in a password, "
                    "what has a meaning in URLs, such as / # ? @, must be percent-encoded"
                ) from None
        return url

    @field_validator("models", "api_keys", "cors_origins", mode="before")
    @classmethod
    def _list_from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return json.loads(value) if value.lstrip().startswith("[") else value.replace(",", " ").split()
