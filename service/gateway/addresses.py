"""Addresses that servers listen on: how to write them, and why one cannot be used."""

from __future__ import annotations

import errno
import os
import socket

from patchforge.service.errors import InvalidRequest

EVERYWHERE = ("0.0.0.0", "::")


def reachable(host: str, port: int) -> str:
    """`host:port` for a client on this machine, as it stands in a URL."""
    if host in EVERYWHERE:
        host = "localhost"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int, setting: str) -> socket.socket:
    """Opens a port; 0 picks any free one. `::` takes IPv4 connections too. `setting` is the one that chooses the port.

    Raises:
        InvalidRequest: the address or the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        message, field = _explain(host, port, error)
        raise InvalidRequest(message, field=field or setting) from error


def _explain(host: str, port: int, error: OSError) -> tuple[str, str | None]:
    """What is wrong, and the setting at fault if it is not the port's."""
    number = error.errno or 0
    if number < 0 or number in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # negative: the name cannot be resolved
        return f"{host} is not an address of this machine", "PATCHFORGE_HOST"
    where = f"port {port} of {host}"
    if number == errno.EADDRINUSE:
        return f"{where} is in use: stop what uses it, or choose another", None
    if number in (errno.EACCES, errno.EPERM):
        return f"{where} is not allowed for this user: choose one above 1023", None
    return f"{where} cannot be used: {os.strerror(number) if number else error}", None
