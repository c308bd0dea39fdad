"""API keys: making them, checking them over HTTP and gRPC, and the few paths that need none."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from hmac import compare_digest

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from patchforge.service.errors import Unauthenticated
from patchforge.service.gateway.prefix import route_path
from patchforge.service.gateway.problems import Problem

# Probes, metrics, and the playground's page and files. Everything else needs a key, future paths included.
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
OPEN_FOLDER = "/playground/"
OPEN_CALLS = frozenset(f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady"))
KEY_PREFIX = "pf-"
"""So that people and secret scanners recognise a key."""


def new_key() -> str:
    """Makes an API key of 256 random bits. It cannot be guessed, so an unsalted hash of it is safe to store."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def make_entry(name: str, key: str) -> str:
    """Returns the entry for `PATCHFORGE_API_KEYS`: the name and the key's SHA-256, which does not reveal the key."""
    return f"{name}:{sha256(key.encode()).hexdigest()}"


class ApiKeys:
    """The keys that may call, as `name:sha256` entries. Without entries, everyone may call."""

    def __init__(self, entries: Iterable[str]) -> None:
        parts = (entry.partition(":") for entry in entries)
        self._known = [(name, bytes.fromhex(digest)) for name, _, digest in parts]

    def authenticate(self, headers: Mapping[str, str | bytes]) -> str | None:
        """Returns the tenant: the name of the key in an HTTP request's headers. None if no keys are configured.

        Raises:
            Unauthenticated: the key is missing or not valid.
        """
        if not self._known:
            return None
        key = _read_key(headers)
        if key is None:
            raise Unauthenticated("an API key is required: send `Authorization: Bearer KEY` or `x-api-key: KEY`")
        digest = sha256(key.encode("utf-8", "replace")).digest()
        # Compares with every key, so that the time taken reveals nothing about any of them.
        names = [name for name, known in self._known if compare_digest(known, digest)]
        if not names:
            raise Unauthenticated("the API key is not valid")
        return names[0]

    def authenticate_call(self, method: str, metadata: Sequence[tuple[str, str | bytes]] | None) -> str | None:
        """Does the same for a gRPC call, from its metadata. Calls in `OPEN_CALLS` need no key.

        Raises:
            Unauthenticated: the key is missing or not valid.
        """
        return None if method in OPEN_CALLS else self.authenticate(dict(metadata or ()))


class AuthMiddleware:
    """ASGI middleware that refuses requests without a valid key, and stores the tenant of the others.

    It refuses before reading the body.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        if scope["type"] == "http" and not is_open(path):
            try:
                tenant = self.keys.authenticate(Headers(scope=scope))
            except Unauthenticated as error:
                await Problem.of(error).response(scope)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether this HTTP path needs no API key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _read_key(headers: Mapping[str, str | bytes]) -> str | None:
    scheme, _, key = str(headers.get("authorization", "")).partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return str(headers.get("x-api-key", "")).strip() or None
