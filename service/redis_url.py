"""What `REDIS_URL` says: one server, or the Sentinels that know which of several servers is the master."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from redis.asyncio.connection import parse_url

SENTINEL = "+sentinel"  # behind redis or rediss
SENTINEL_PORT = 26379
REDIS_PORT = 6379


@dataclass(frozen=True)
class RedisUrl:
    """A parsed URL."""

    options: dict[str, Any] = field(repr=False)
    """Arguments of redis-py's connections: user, password, database, and what the query sets."""
    addresses: tuple[tuple[str, int], ...]
    """Host and port of the server, or of each Sentinel; none for a Unix socket."""
    service: str | None
    """The name that Sentinels give the master; None if the URL names the server itself."""
    tls: bool

    @classmethod
    def parse(cls, url: str) -> RedisUrl:
        """Reads `redis://`, `rediss://`, `unix://`, `redis+sentinel://` or `rediss+sentinel://`.

        Raises:
            ValueError: it is none of these, or incomplete.
        """
        parts = urlsplit(url)
        if not parts.scheme.endswith(SENTINEL):
            options: dict[str, Any] = dict(parse_url(url))
            address = options.pop("host", "localhost"), options.pop("port", REDIS_PORT)
            return cls(_plain(options), () if "path" in options else (address,), None, parts.scheme == "rediss")
        return cls._of_sentinels(parts.scheme.removesuffix(SENTINEL), parts.netloc, parts.path, parts.query)

    @classmethod
    def _of_sentinels(cls, scheme: str, netloc: str, path: str, query: str) -> RedisUrl:
        account, at, hosts = netloc.rpartition("@")
        service, _, number = path.strip("/").partition("/")
        addresses = tuple(_split_address(host) for host in hosts.split(","))
        if scheme not in ("redis", "rediss") or not service or (number and not number.isdecimal()):
            raise ValueError("needs redis+sentinel://host,host/name/number")
        # The rest is as in other URLs: redis-py reads it, with a host that does not matter.
        options: dict[str, Any] = dict(parse_url(urlunsplit((scheme, f"{account}{at}host", f"/{number}", query, ""))))
        del options["host"]
        return cls(_plain(options), addresses, unquote(service), scheme == "rediss")


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "connection_class"}


def _split_address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a host is missing")
    return unquote(parts.hostname), parts.port or SENTINEL_PORT
