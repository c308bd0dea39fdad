"""Hosts for processes under test: network namespaces where this process may make them, or the loopback address."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from patchforge.service.errors import Unavailable

NETWORK = "10.213"  # of the bridge between the namespaces; its own end is NETWORK.0.1


@dataclass(frozen=True)
class Host:
    """Where a process runs."""

    address: str
    before: tuple[str, ...] = ()
    """What a command must begin with, to run there."""


class Hosts:
    """Makes hosts. Without namespaces, all are this machine's loopback address."""

    def __init__(self, bridge: str | None, stack: ExitStack) -> None:
        self._bridge, self._stack, self._made = bridge, stack, 0

    @property
    def apart(self) -> bool:
        """Whether each host is a network namespace."""
        return self._bridge is not None

    def make(self) -> Host:
        """Returns a new host.

        Raises:
            Unavailable: the namespace cannot be made.
        """
        if self._bridge is None:
            return Host("127.0.0.1")
        self._made += 1
        number = self._made + 1
        name, link = f"{self._bridge}-{number}", f"{self._bridge}v{number}"
        address = f"{NETWORK}.{number // 250}.{number % 250 + 2}"
        _ip("netns", "add", name)
        self._stack.callback(_ip, "netns", "del", name)  # its end of the link goes with it, and so does the other
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", self._bridge, "up")
        _ip("-n", name, "address", "add", f"{address}/16", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return Host(address, (_path(), "netns", "exec", name))


@contextmanager
def hosts(apart: bool | None) -> Iterator[Hosts]:
    """Yields a maker of hosts. `apart`: in namespaces, or on loopback; None: in namespaces if that is possible.

    Raises:
        Unavailable: namespaces are wanted, but need root, Linux and the program `ip`.
    """
    with ExitStack() as stack:
        bridge = f"pf{os.getpid() % 100_000}"
        try:
            if apart is not False:
                _ip("link", "add", bridge, "type", "bridge")
                stack.callback(_ip, "link", "del", bridge)
                _ip("address", "add", f"{NETWORK}.0.1/16", "dev", bridge)
                _ip("link", "set", bridge, "up")
        except Unavailable:
            if apart:
                raise
            apart = False
        yield Hosts(None if apart is False else bridge, stack)


def _path() -> str:
    found = shutil.which("ip")
    if found is None:
        raise Unavailable("network namespaces need the program `ip`, of the package iproute2")
    return found


def _ip(*words: str) -> None:
    command: Sequence[str] = (_path(), *words)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"no network namespaces here: `ip {' '.join(words)}` said: {done.stderr.strip()}")
