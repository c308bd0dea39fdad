"""Clients of the queue's master: connections that refuse a replica, and pools that follow the master."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool, SentinelManagedConnection, SentinelManagedSSLConnection
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AskError, ConnectionError, MovedError, RedisError, TimeoutError
from redis.maint_notifications import MaintNotificationsConfig

from patchforge.service.errors import InvalidRequest
from patchforge.service.queue.sentinels import Address, FixedAddress, Locator, Sentinels
from patchforge.service.redis_url import RedisUrl
from patchforge.service.settings import Settings

SENTINEL_TIMEOUT = 2.0  # seconds to wait for a Sentinel; there are others
UNSHARED = "himport_registry", "connection_pool"  # arguments that each pool of redis-py makes for itself


class NotMaster(ConnectionError):
    """The server is a replica. What it holds may be old, and it takes no writes."""


class UnreadablePassword(ConnectionError):
    """A file with a password cannot be read."""


class PasswordFile(CredentialProvider):
    """Reads the password for every new connection, so that it may change while we run."""

    def __init__(self, path: Path, setting: str, username: str | None) -> None:
        self._path = path
        self._setting = setting
        self._username = username

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._path.read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UnreadablePassword(f"{self._setting} cannot be read: {why}") from error
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


class _MasterOnly(AbstractConnection):
    """A connection that is closed at once if a replica answers."""

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        await super().on_connect_check_health(check_health)
        # Unlike ROLE, HELLO is allowed to every user. A cluster's nodes redirect by themselves.
        await self.send_command("HELLO", check_health=False)
        answer: Any = await self.read_response()
        about = answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))
        if about[b"mode"] != b"cluster" and about[b"role"] != b"master":
            raise NotMaster("the server is a replica")


class _Located(SentinelManagedConnection):
    """A connection to wherever its pool says that the master is."""

    async def connect_to(self, address: Address) -> None:
        try:
            await super().connect_to(address)
        except (ConnectionError, TimeoutError):
            self.connection_pool.locator.forget()
            other = await self.connection_pool.get_master_address()
            if other == address:
                raise
            await super().connect_to(other)


class _TcpConnection(_MasterOnly, _Located):
    pass


class _TlsConnection(_MasterOnly, _Located, SentinelManagedSSLConnection):
    pass


class _UnixConnection(_MasterOnly, UnixDomainSocketConnection):
    pass


class MasterPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the master. If another server becomes it, they are replaced, within about `LOOK_SECONDS`."""

    def __init__(self, locator: Locator, service: str, **options: Any) -> None:
        super().__init__(service, locator, **options)
        self.locator = locator
        self._looking: asyncio.Task[None] | None = None

    async def get_connection(self, *arguments: Any, **options: Any) -> AbstractConnection:
        # A stale master, cut off from the Sentinels but not from us, would go on answering.
        if self.locator.watched and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look())
        return await super().get_connection(*arguments, **options)

    async def get_master_address(self) -> Address:
        """Returns the master's address, and closes connections to any other server when they are not in use."""
        before = self.master_address
        address: Address = await super().get_master_address()
        if before not in (None, address):
            await self.update_active_connections_for_reconnect()
        return address

    async def aclose(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await super().aclose()
        await self.locator.aclose()

    async def _look(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self.get_master_address()


class MasterClient(Redis):
    """A client that goes where a cluster's nodes send it. All keys are in one slot, so one node has the queue."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._scripts: dict[str, str] = {}

    def client(self) -> MasterClient:
        one = cast(MasterClient, super().client())
        one._scripts = self._scripts
        return one

    def register_script(self, script: Any) -> Any:
        registered = super().register_script(script)
        self._scripts[registered.sha] = script
        return registered

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Runs a command. One that was answered with a redirection was not run, so it may be sent again."""
        try:
            return await super().execute_command(*args, **options)
        except MovedError as error:
            pool: Any = self.connection_pool
            pool.locator.follow(self._target(error))
            if self.connection is not None:
                await self.connection.disconnect()
            await pool.get_master_address()
            return await super().execute_command(*args, **options)
        except AskError as error:
            return await self._ask(self._target(error), *args, **options)

    async def _ask(self, address: Address, *args: Any, **options: Any) -> Any:
        """Runs one command at the node that the slot is moving to."""
        if args[0] == "EVALSHA" and args[1] in self._scripts:
            args = ("EVAL", self._scripts[args[1]], *args[2:])  # that node may not know the script yet
        pool: Any = self.connection_pool
        shared = {name: value for name, value in pool.connection_kwargs.items() if name not in UNSHARED}
        there = MasterPool(FixedAddress(address), "", connection_class=pool.connection_class, **shared)
        async with Redis.from_pool(there) as redis, redis.client() as one:
            await one.execute_command("ASKING")
            return await one.execute_command(*args, **options)

    def _target(self, error: AskError) -> Address:
        pool: Any = self.connection_pool
        return error.host or pool.master_address[0], error.port  # no host: the one that answered


def open_clients(url: str, settings: Settings, *, timeout: float, longest_block: float) -> tuple[Redis, Redis]:
    """Returns a client for commands and one for blocking reads, both with time limits. They connect on first use.

    Neither of them retries: a write that timed out may have happened, and only the caller knows whether to repeat it.

    Args:
        timeout: seconds to wait for a connection, and for an answer to a command.
        longest_block: the longest blocking read, in seconds.

    Raises:
        InvalidRequest: a file with a certificate or key cannot be used.
    """
    target = RedisUrl.parse(url)
    options = _options(target, settings)
    locator = _locator(target, settings, options)
    commands = {"max_connections": 32, "timeout": timeout, "socket_timeout": timeout}
    blocking = {"max_connections": 8, "timeout": timeout, "socket_timeout": longest_block + timeout}
    common = {"socket_connect_timeout": timeout, **_unhelped()}

    def client(limits: dict[str, Any]) -> Redis:
        merged = {**limits, **common, **options}
        pool: ConnectionPool
        if locator is None:
            pool = BlockingConnectionPool(connection_class=_UnixConnection, **merged)
        else:
            kind = _TlsConnection if target.tls else _TcpConnection
            pool = MasterPool(locator, target.service or "", connection_class=kind, **merged)
        return MasterClient.from_pool(pool)

    return client(commands), client(blocking)


def _unhelped() -> dict[str, Any]:
    """Returns options that keep redis-py from doing more than it was asked for.

    With maintenance notifications, it does not check whether the server closed a pooled connection, so each connection
    would fail once more after a restart.
    """
    return {
        "retry": Retry(NoBackoff(), 0),
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def _options(target: RedisUrl, settings: Settings) -> dict[str, Any]:
    """Returns who we are and whom we trust, as arguments of redis-py's connections."""
    options = dict(target.options)
    if (path := settings.redis_password_file) is not None:
        options.pop("password", None)
        name = "PATCHFORGE_REDIS_PASSWORD_FILE"
        options["credential_provider"] = PasswordFile(path, name, options.pop("username", None))
    return options | _tls_options(target, settings)


def _tls_options(target: RedisUrl, settings: Settings) -> dict[str, Any]:
    ca, cert, key = settings.redis_tls_ca, settings.redis_tls_cert, settings.redis_tls_key
    named = {"ssl_ca_certs": ca, "ssl_certfile": cert, "ssl_keyfile": key}
    given = {name: str(path) for name, path in named.items() if path is not None}
    if given and not target.tls:
        raise InvalidRequest("is set, but REDIS_URL does not begin with rediss", field="PATCHFORGE_REDIS_TLS_…")
    if key is not None and cert is None:
        raise InvalidRequest("is set without PATCHFORGE_REDIS_TLS_CERT", field="PATCHFORGE_REDIS_TLS_KEY")
    # Each connection reads the files anew, so renewed ones need no restart. At the start, they must be right.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is not None:
        with _usable("PATCHFORGE_REDIS_TLS_CA", ca):
            context.load_verify_locations(ca)
    if cert is not None:
        with _usable("PATCHFORGE_REDIS_TLS_CERT", cert):
            context.load_cert_chain(cert, key, password="")  # the empty password prevents a prompt on the terminal
    return given


@contextlib.contextmanager
def _usable(setting: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        raise InvalidRequest(f"cannot use {path}: {reason}", field=setting) from error


def _locator(target: RedisUrl, settings: Settings, options: dict[str, Any]) -> Locator | None:
    """Returns what finds the master; None for a Unix socket."""
    if target.service is None:
        return FixedAddress(target.addresses[0]) if target.addresses else None
    tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
    account: dict[str, Any] = {}
    if (path := settings.redis_sentinel_password_file) is not None:
        name = "PATCHFORGE_REDIS_SENTINEL_PASSWORD_FILE"
        account["credential_provider"] = PasswordFile(path, name, None)
    limits = {"socket_timeout": SENTINEL_TIMEOUT, "socket_connect_timeout": SENTINEL_TIMEOUT}
    return Sentinels(target.addresses, ssl=target.tls, **tls, **account, **limits, **_unhelped())
