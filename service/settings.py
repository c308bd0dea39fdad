"""Settings from `PATCHFORGE_…` environment variables, grouped by what they steer."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

KEY_NAME = r"[A-Za-z0-9._-]{1,64}"
OBJECTS = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_-][A-Za-z0-9._-]*)*"
ROOT_PATH = r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+"
ApiKey = Annotated[str, Field(pattern=f"^{KEY_NAME}:[0-9a-f]{{64}}$")]


class NetworkSettings(BaseSettings):
    """Addresses and TLS"""

    host: str = Field("127.0.0.1", description="Address of the HTTP and gRPC servers.")
    http_port: int = Field(8000, ge=0, le=65535, description="REST, OpenAI API and playground; 0 = any free port.")
    grpc_port: int = Field(50051, ge=0, le=65535, description="gRPC; 0 = any free port.")
    worker_metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus metrics of a worker; 0 = off.")
    metrics_of_workers: bool = Field(
        False,
        description="Add the workers' metrics to the gateway's `/metrics`; `patchforge serve` does so by default.",
    )
    root_path: str = Field(
        "",
        description="Path under which a proxy shows this server, such as `/images`; `X-Forwarded-Prefix` overrides it.",
    )
    tls_cert: Path | None = Field(None, description="PEM certificate chain for HTTPS and gRPC; empty = no TLS.")
    tls_key: Path | None = Field(None, description="PEM private key of the certificate, without a password.")


class ModelSettings(BaseSettings):
    """Models"""

    bundle_dir: Annotated[list[Path], NoDecode] = Field(
        [],
        description="Bundles, or folders with one subfolder per bundle, separated by `:`; `shipped` = those in the "
        "package, which is the default.",
    )
    models: Annotated[list[str], NoDecode] = Field(
        [], description="Names of the bundles to serve; empty = all bundles."
    )
    default_models: Annotated[list[str], NoDecode] = Field(
        [],
        description="Models for requests that name none: the first that is served and fits; others follow by name.",
    )
    remember_seconds: int = Field(
        0,
        ge=0,
        description="How long a model is still accepted after its last worker has gone, for an autoscaler that starts "
        "workers when jobs wait; 0 = refused at once.",
    )


class AccessSettings(BaseSettings):
    """Callers and their limits"""

    api_keys: Annotated[list[ApiKey], NoDecode] = Field(
        [],
        repr=False,
        description="API keys, as name:sha256 entries from `patchforge hash-key`; empty = no key required.",
    )
    cors_origins: Annotated[list[str], NoDecode] = Field(
        [], description="Origins whose pages may call from a browser; `*` = any; empty = none."
    )
    rate_limit: int = Field(0, ge=0, description="Pictures per minute for one API key, else 429; 0 = no limit.")
    rate_burst: int = Field(20, ge=1, description="Pictures that one API key may request at once after a quiet time.")
    max_in_flight: int = Field(0, ge=0, description="Waiting and running jobs of one API key, else 429; 0 = no limit.")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Largest HTTP body in bytes; larger ones are refused.")
    max_upload_bytes: int = Field(8 << 20, ge=1024, description="The same for bodies with pictures and gRPC messages.")
    client_timeout_seconds: float = Field(
        30.0,
        gt=0,
        description="Longest silence of a client that sends a request or reads a stream; also the time for the head of "
        "a request, and, with a second more for each 8 KiB received, for its body.",
    )
    sse_ping_seconds: float = Field(10.0, gt=0, description="Longest silence on an idle stream, SSE or gRPC.")


class QueueSettings(BaseSettings):
    """Queue"""

    redis_url: str | None = Field(
        None,
        validation_alias=AliasChoices("PATCHFORGE_REDIS_URL", "REDIS_URL"),
        description="Queue server or its Sentinels, with a percent-encoded password; empty = `patchforge serve` starts "
        "its own.",
    )
    redis_urls: Annotated[list[str], NoDecode] = Field(
        [],
        max_length=8,
        description="Several queue servers that share the jobs, instead of `PATCHFORGE_REDIS_URL`: one list for all "
        "gateways and workers, in an order that never changes. New ones go to its end.",
    )
    redis_draining: Annotated[list[int], NoDecode] = Field(
        [],
        description="Places in `PATCHFORGE_REDIS_URLS`, from 0, of servers that get no new jobs, files or batches; for "
        "gateways.",
    )
    redis_password_file: Path | None = Field(
        None, description="File with the queue server's password, read for each connection; replaces the URL's."
    )
    redis_sentinel_password_file: Path | None = Field(None, description="The same for the Sentinels, if they have one.")
    redis_tls_ca: Path | None = Field(
        None, description="PEM file of CAs for the queue server's certificate, besides the system's; for `rediss`."
    )
    redis_tls_cert: Path | None = Field(None, description="PEM certificate by which the queue server knows us.")
    redis_tls_key: Path | None = Field(None, description="PEM private key of that certificate, without a password.")
    redis_wait_replicas: int = Field(
        0, ge=0, description="Replicas that must have a job before it is accepted, else 503; 0 = none."
    )
    redis_memory_bytes: int = Field(
        0,
        ge=0,
        description="Most memory of the queue server for all that it holds: a job that might need more is refused with "
        "503. 0 = only the server's own `maxmemory` counts; otherwise the smaller one.",
    )
    data_dir: Path = Field(Path(".patchforge"), description="Data folder of the embedded queue server.")
    max_waiting: int = Field(256, ge=1, description="Waiting jobs; beyond that, new jobs are refused with 503.")
    max_attempts: int = Field(3, ge=1, description="Starts of a job before it is dead-lettered.")
    claim_idle_seconds: float = Field(30.0, gt=0, description="Silence of a worker before its jobs are reclaimed.")
    result_ttl_seconds: int = Field(3600, ge=1, description="Lifetime of finished jobs, their pictures and events.")
    idempotency_ttl_seconds: int = Field(86400, ge=1, description="Lifetime of an Idempotency-Key.")
    batch_in_flight: int = Field(
        8,
        ge=1,
        description="Jobs of all batches together that wait or run, for each live worker; the others stay in their "
        "files. Half of `PATCHFORGE_MAX_RUNNING` leaves room for everyone else.",
    )
    batch_ttl_seconds: int = Field(
        86400, ge=1, description="Lifetime of an ended batch, of its pictures, and of files for batches."
    )


class ResultSettings(BaseSettings):
    """Results"""

    results: str = Field(
        "redis",
        description="Where pictures are kept: `redis` = on the queue server; `s3://bucket/prefix` = in an object "
        "store, whose address, region and credentials the usual `AWS_…` variables say.",
    )
    results_public_url: str | None = Field(
        None, description="The object store's address in links to pictures, if clients reach it under another one."
    )
    results_preview_bytes: int = Field(
        64 << 10,
        ge=1024,
        description="Previews that are larger go into the object store too, if there is one; Redis has small copies.",
    )
    results_tls_ca: Path | None = Field(
        None, description="PEM file of CAs for the object store's certificate, besides the usual ones."
    )


class WorkerSettings(BaseSettings):
    """Worker"""

    max_running: int = Field(16, ge=1, description="Concurrent jobs per worker.")
    patch_budget: int | None = Field(
        None, ge=1, description="Patches per network evaluation; default: profiled when the worker starts."
    )
    cache_bytes: int = Field(
        2 << 30, ge=1, description="Memory for the keys and values of running pictures; pictures wait if it is full."
    )
    degrade: bool = Field(
        True, description="Lower the quality under load, unless a request fixes it, rather than let all wait."
    )
    min_quality: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of a picture's usual patch evaluations that load aims at; more load makes requests wait.",
    )
    target_latency: float = Field(
        5.0, gt=0, description="How many times as long as alone a request may take before its quality is lowered."
    )
    preview_interval_seconds: float = Field(0.1, ge=0, description="Minimum time between previews of one picture.")
    preview_share: float = Field(0.1, gt=0, description="Maximum share of a worker's time for previews.")
    compile: bool = Field(
        False, description="Compile parts of the networks with torch.compile, for GPUs; needs a C++ compiler."
    )
    device: str = Field(
        "auto", description="Device of a worker, by PyTorch's name: cpu, cuda, cuda:1, mps, xpu; auto = an accelerator."
    )
    text_device: str = Field(
        "auto",
        description="Device of text encoders in bundles, such as cpu to spare a GPU; auto = that of the worker.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of matrix products; auto = bfloat16 on CUDA and XPU, float32 elsewhere."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a worker; default: all cores that it may use.")


class ProcessSettings(BaseSettings):
    """Shutdown and logs"""

    drain_seconds: int = Field(10, ge=0, description="Time for running jobs to finish when a gateway or worker stops.")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")
    log_json: bool = Field(False, description="Log one JSON object per line instead of text for people.")


GROUPS = (
    NetworkSettings,
    ModelSettings,
    AccessSettings,
    QueueSettings,
    ResultSettings,
    WorkerSettings,
    ProcessSettings,
)


class Settings(
    NetworkSettings, ModelSettings, AccessSettings, QueueSettings, ResultSettings, WorkerSettings, ProcessSettings
):
    """All settings of gateway and worker; the defaults suit one laptop and listen on loopback only."""

    # Errors hide the value, which may be a misplaced key or a URL with a password. An empty variable counts as unset,
    # because Compose cannot easily leave a variable out.
    model_config = SettingsConfigDict(
        env_prefix="PATCHFORGE_", extra="ignore", hide_input_in_errors=True, env_ignore_empty=True
    )

    @property
    def queue_urls(self) -> list[str]:
        """The queue servers, each at the place that is its number; empty if none is named."""
        return self.redis_urls or ([] if self.redis_url is None else [self.redis_url])

    @property
    def stop_seconds(self) -> int:
        """Time from SIGTERM to the end of a gateway or worker; after that, send SIGKILL."""
        return self.drain_seconds + 10

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, path: str) -> str:
        path = path.rstrip("/")
        if path and not re.fullmatch(ROOT_PATH, path):
            raise ValueError("must be a path such as /images, of letters, digits and . _ ~ -")
        return path

    @field_validator("log_level")
    @classmethod
    def _check_log_level(cls, name: str) -> str:
        if name.upper() not in logging.getLevelNamesMapping():
            raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
        return name.upper()

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: str | None) -> str | None:
        return url if url is None else _checked_redis_url(url)

    @field_validator("redis_urls", mode="before")
    @classmethod
    def _split_urls(cls, value: Any) -> Any:
        """Split at spaces, and at commas before a URL: others are between Sentinels."""
        if not isinstance(value, str) or value.lstrip().startswith("["):
            return json.loads(value) if isinstance(value, str) else value
        return [url for url in re.split(r"[\s,]+(?=[a-z+]+://)|\s+", value.strip(" ,\n")) if url]

    @field_validator("redis_urls")
    @classmethod
    def _check_redis_urls(cls, urls: list[str]) -> list[str]:
        if len(set(urls)) < len(urls):
            raise ValueError("names a queue server twice")
        return [_checked_redis_url(url) for url in urls]

    @field_validator("results")
    @classmethod
    def _check_results(cls, place: str) -> str:
        place = place.rstrip("/")
        if place != "redis" and not re.fullmatch(OBJECTS, place):
            raise ValueError("must be redis, or s3://bucket or s3://bucket/prefix, of letters, digits and . _ -")
        return place

    @field_validator("results_public_url")
    @classmethod
    def _check_results_public_url(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[A-Za-z0-9.:_\[\]-]+/?", url):
            raise ValueError("must be an address such as https://s3.example.com, without a path")
        return url and url.rstrip("/")

    @field_validator("bundle_dir", mode="before")
    @classmethod
    def _split_paths(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [part for part in value.split(os.pathsep) if part]
        return [value] if isinstance(value, Path) else value

    @field_validator("models", "default_models", "api_keys", "cors_origins", "redis_draining", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return json.loads(value) if value.lstrip().startswith("[") else value.replace(",", " ").split()


def _checked_redis_url(url: str) -> str:
    """Check it here: the Redis client would raise later, with part of the password as the port."""
    from patchforge.service.redis_url import RedisUrl

    try:
        RedisUrl.parse(url)
    except ValueError:
        raise ValueError(
            "must be redis://[[user]:password@]host[:port][/number], or rediss:// or unix://, or "
            "redis+sentinel://[[user]:password@]host[:port],host[:port]/name[/number], or rediss+sentinel://; "
            "in a password, characters with a meaning in URLs, such as / # ? @, must be percent-encoded"
        ) from None
    return url
