"""A replicated queue server as people run it: three servers and three Sentinels, each pair on a host of its own.

The hosts are loopback addresses, and every connection between them goes through a `Relay`. So a host can be cut off
from the others while clients still reach it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis import Redis
from redis.exceptions import RedisError

from patchforge.service.embedded import find_binary
from tests.patience import PATIENCE
from tests.processes import eventually, launch, stop
from tests.relay import Relay

NAME = "queue"
HOSTS = "127.0.1.1", "127.0.1.2", "127.0.1.3"
DOWN_MS = 2000  # silence after which a Sentinel considers a master dead
Options = dict[str, str | int]


@dataclass(frozen=True)
class Tls:
    """A server's program that was built with TLS, and PEM files: a CA, and a certificate and key for all `HOSTS`."""

    binary: str
    ca: Path
    cert: Path
    key: Path

    def server(self, port: int) -> Options:
        """Options of a server or a Sentinel. Without a certificate of this CA, nobody may connect."""
        files = {"tls-ca-cert-file": self.ca, "tls-cert-file": self.cert, "tls-key-file": self.key}
        named: Options = {name: str(path) for name, path in files.items()}
        return named | {"port": 0, "tls-port": port, "tls-replication": "yes"}

    def client(self) -> dict[str, Any]:
        """Arguments of redis-py."""
        files = {"ssl_ca_certs": self.ca, "ssl_certfile": self.cert, "ssl_keyfile": self.key}
        return {"ssl": True, **{name: str(path) for name, path in files.items()}}


@dataclass
class Node:
    """One server or Sentinel, at `host:port` for everybody else."""

    folder: Path
    relay: Relay
    binary: str
    options: Options = field(default_factory=dict)
    sentinel: bool = False
    tls: Tls | None = None
    process: subprocess.Popen[str] | None = None

    @property
    def host(self) -> str:
        return self.relay.host

    @property
    def port(self) -> int:
        return self.relay.port

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Starts it with the configuration that it was first given, plus what it wrote there itself."""
        config = self.folder / "server.conf"
        if not config.exists():
            config.write_text("".join(f"{name} {value}\n" for name, value in self.options.items()))
        words = ["--sentinel"] if self.sentinel else []
        with (self.folder / "log").open("a") as log:
            self.process = launch(self.binary, config, *words, cwd=self.folder, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def client(self, **options: Any) -> Redis:
        """A plain client, past the relay."""
        options |= {"socket_timeout": PATIENCE, "socket_connect_timeout": PATIENCE}
        options |= self.tls.client() if self.tls else {}
        return Redis(host=self.host, port=self.relay.server_port, **options)


class Replicated:
    """Three servers and three Sentinels; a context manager."""

    def __init__(
        self, folder: Path, *, sentinel_password: str = "", tls: Tls | None = None, **server: str | int
    ) -> None:
        """`server` has further options of the servers, with `_` for `-`."""
        self.tls = tls
        self.isolated: set[str] = set()
        self.password = str(server.get("requirepass", ""))
        self.sentinel_password = sentinel_password
        self._extra = {name.replace("_", "-"): value for name, value in server.items()}
        self.servers = [self._node(folder, host, "server") for host in HOSTS]
        self.sentinels = [self._node(folder, host, "sentinel") for host in HOSTS]
        for node in self.servers:
            node.options |= self._server_options(node)
        for node in self.sentinels:
            node.options |= self._sentinel_options(node)

    @property
    def url(self) -> str:
        hosts = ",".join(f"{each.host}:{each.port}" for each in self.sentinels)
        scheme = "rediss" if self.tls else "redis"
        return f"{scheme}+sentinel://{f':{self.password}@' if self.password else ''}{hosts}/{NAME}/0"

    @property
    def master(self) -> Node:
        """The server that most Sentinels name."""
        named = [self._named_by(each) for each in self.sentinels if each.host not in self.isolated]
        [master] = [each for each in self.servers if named.count(each.port) > 1]
        return master

    def new_master(self, old: Node) -> Node:
        """Waits until all Sentinels that are not cut off name another server."""

        def changed() -> bool:
            named = [self._named_by(each) for each in self.sentinels if each.host not in self.isolated]
            return len(set(named)) == 1 and named[0] not in (None, old.port)

        eventually(changed, "another master")
        return self.master

    def settled(self) -> None:
        """Waits until the master has two replicas that follow it."""
        eventually(self._settled, "two replicas")

    def cut_off(self, host: str) -> None:
        """Parts a host from the other hosts, and not from clients."""
        self.isolated.add(host)

    def repair(self) -> None:
        """Starts what was killed, resumes what was paused, and joins what was parted."""
        self.isolated.clear()
        for node in (*self.servers, *self.sentinels):
            if node.process is None or node.process.poll() is not None:
                node.start()
            os.kill(node.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        for node in (*self.servers, *self.sentinels):
            node.start()
        self.settled()
        eventually(self._acquainted, "the Sentinels to know each other and the replicas")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in (*self.servers, *self.sentinels):
            node.kill()
            node.relay.close()
            print(f"--- {node.folder.name}\n{(node.folder / 'log').read_text()}")  # pytest shows it if the test failed

    def _node(self, folder: Path, host: str, kind: str) -> Node:
        place = folder / f"{kind}-{HOSTS.index(host)}"
        place.mkdir()
        relay = Relay(host, lambda caller: caller in HOSTS and (caller in self.isolated) != (host in self.isolated))
        options: Options = {"bind": host, "bind-source-addr": host, "port": relay.server_port, "dir": str(place)}
        options |= self.tls.server(relay.server_port) if self.tls else {}
        binary = self.tls.binary if self.tls else find_binary()
        return Node(place, relay, binary, options, sentinel=kind == "sentinel", tls=self.tls)

    def _server_options(self, node: Node) -> Options:
        first = self.servers[0]
        options: Options = {
            "protected-mode": "no",
            "appendonly": "yes",
            "save": '""',
            "maxmemory-policy": "noeviction",
            "replica-announce-ip": node.host,
            "replica-announce-port": node.port,
            "repl-diskless-sync-delay": 0,
            "repl-timeout": 10,
        }
        if self.password:
            options["masterauth"] = self.password
        if node is not first:
            options["replicaof"] = f"{first.host} {first.port}"
        return options | self._extra

    def _sentinel_options(self, node: Node) -> Options:
        first = self.servers[0]
        options: Options = {
            "protected-mode": "no",
            "sentinel announce-ip": node.host,
            "sentinel announce-port": node.port,
            f"sentinel monitor {NAME}": f"{first.host} {first.port} 2",
            f"sentinel down-after-milliseconds {NAME}": DOWN_MS,
            f"sentinel failover-timeout {NAME}": 6000,
        }
        if self.password:
            options[f"sentinel auth-pass {NAME}"] = self.password
        if self.sentinel_password:
            options |= {"requirepass": self.sentinel_password, "sentinel sentinel-pass": self.sentinel_password}
        return options

    def _named_by(self, sentinel: Node) -> int | None:
        with contextlib.suppress(RedisError, OSError), sentinel.client(password=self.sentinel_password or None) as ask:
            answer: Any = ask.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
            return int(answer[1]) if answer else None
        return None

    def _settled(self) -> bool:
        with contextlib.suppress(RedisError, OSError, ValueError), self._client(self.master) as client:
            info: Any = client.info("replication")
            online = [each for each in info.values() if isinstance(each, dict) and each.get("state") == "online"]
            return info["role"] == "master" and len(online) == len(HOSTS) - 1
        return False

    def _acquainted(self) -> bool:
        for sentinel in self.sentinels:
            with sentinel.client(password=self.sentinel_password or None) as ask:
                about: Any = ask.sentinel_master(NAME)
                if about["num-other-sentinels"] != len(HOSTS) - 1 or about["num-slaves"] != len(HOSTS) - 1:
                    return False
        return True

    def _client(self, node: Node) -> Redis:
        return node.client(password=self.password or None)


def pause(node: Node) -> None:
    stop(node.pid)
