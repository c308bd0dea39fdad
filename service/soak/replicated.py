"""A replicated queue server as people run it: three servers and three Sentinels, each pair on a host of its own.

The hosts are loopback addresses, and every connection between them goes through a `Relay`. So a host can be cut off
from the others while clients still reach it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis import Redis
from redis.exceptions import RedisError

from patchforge.service.embedded import find_binary, tied_to_parent
from patchforge.service.errors import Unavailable
from patchforge.service.soak.relay import Relay

NAME = "queue"
HOSTS = "127.0.1.1", "127.0.1.2", "127.0.1.3"
DOWN_MS = 5000  # silence after which a Sentinel considers a master dead
PATIENCE = 240.0  # seconds for whatever must happen
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
    process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return self.relay.host

    @property
    def port(self) -> int:
        return self.relay.port

    @property
    def pid(self) -> int:
        if self.process is None:
            raise Unavailable(f"the server in {self.folder} was not started")
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Starts it with the configuration that it was first given, plus what it wrote there itself."""
        config = self.folder / "server.conf"
        if not config.exists():
            config.write_text("".join(f"{name} {value}\n" for name, value in self.options.items()))
        words = ["--sentinel"] if self.sentinel else []
        with (self.folder / "log").open("a") as log:
            command = tied_to_parent([self.binary, str(config), *words], signal.SIGKILL)
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def client(self, **options: Any) -> Redis:
        """A plain client, past the relay."""
        options = {"socket_timeout": PATIENCE, "socket_connect_timeout": PATIENCE} | options
        options |= self.tls.client() if self.tls else {}
        return Redis(host=self.host, port=self.relay.server_port, **options)


class Replicated:
    """Three servers and three Sentinels; a context manager. Use it from a thread that does not end: so do they."""

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
    def nodes(self) -> list[Node]:
        return [*self.servers, *self.sentinels]

    @property
    def master(self) -> Node:
        """The server that most Sentinels name.

        Raises:
            Unavailable: they do not agree at the moment.
        """
        named = self._named()
        for server in self.servers:
            if named.count(server.port) > 1:
                return server
        raise Unavailable("the Sentinels do not agree on a master")

    def new_master(self, old: Node) -> Node:
        """Waits until `replaced`; returns the new master."""
        _eventually(lambda: self.replaced(old), "another master")
        return self.master

    def replaced(self, old: Node) -> bool:
        """Whether all Sentinels that are not cut off name the same other server."""
        named = set(self._named())
        return len(named) == 1 and named.isdisjoint({None, old.port})

    def settled(self) -> None:
        """Waits until `whole`."""
        _eventually(self.whole, "two replicas")

    def whole(self) -> bool:
        """Whether the master has two replicas that follow it."""
        with contextlib.suppress(RedisError, OSError, ValueError, Unavailable), self.client(self.master) as client:
            info: Any = client.info("replication")
            online = [each for each in info.values() if isinstance(each, dict) and each.get("state") == "online"]
            return info["role"] == "master" and len(online) == len(HOSTS) - 1
        return False

    def client(self, node: Node, **options: Any) -> Redis:
        """A plain client of one server, past its relay."""
        return node.client(password=self.password or None, **options)

    def cut_off(self, host: str) -> None:
        """Parts a host from the other hosts, and not from clients."""
        self.isolated.add(host)

    def repair(self) -> None:
        """Starts what was killed, resumes what was paused, and joins what was parted."""
        self.isolated.clear()
        for node in self.nodes:
            if not node.running:
                node.start()
            os.kill(node.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                node.start()
            self.settled()
            _eventually(self._acquainted, "the Sentinels to know each other and the replicas")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
            node.relay.close()

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

    def _named(self) -> list[int | None]:
        return [self._named_by(each) for each in self.sentinels if each.host not in self.isolated]

    def _named_by(self, sentinel: Node) -> int | None:
        with contextlib.suppress(RedisError, OSError), sentinel.client(password=self.sentinel_password or None) as ask:
            answer: Any = ask.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
            return int(answer[1]) if answer else None
        return None

    def _acquainted(self) -> bool:
        for sentinel in self.sentinels:
            with sentinel.client(password=self.sentinel_password or None) as ask:
                about: Any = ask.sentinel_master(NAME)
                if about["num-other-sentinels"] != len(HOSTS) - 1 or about["num-slaves"] != len(HOSTS) - 1:
                    return False
        return True


def _eventually(attempt: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + PATIENCE
    while not attempt():
        if time.monotonic() > give_up:
            raise Unavailable(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.02)
