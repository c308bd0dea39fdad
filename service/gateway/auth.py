"""Who is calling: API keys over HTTP and gRPC, and the few doors that stay open without one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from hmac import compare_digest

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unauthenticated
from service.gateway.problems import Problem

# Probes, scrapes and the playground's own page and files. Whatever else there is, or will be, needs a key.
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
OPEN_FOLDER = "/playground/"
OPEN_CALLS = frozenset(f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady"))


class ApiKeys:
    """The names of callers by the SHA-256 of their keys, as ``name:hash``; with none listed, everyone may call."""

    def __init__(self, entries: Iterable[str]) -> None:
        parts = (entry.partition(":") for entry in entries)
        self._known = [(name, bytes.fromhex(digest)) for name, _, digest in parts]

    @property
    def needed(self) -> bool:
        return bool(self._known)

    def tenant(self, headers: Mapping[str, str | bytes]) -> str | None:
        """The name of the key among a request's headers, None if no key is needed. Raises Unauthenticated."""
        if not self.needed:
            return None
        key = _key_in(headers)
        if key is None:
            raise Unauthenticated("an API key is needed: send it as `Authorization: Bearer …` or as `x-api-key`")
        digest = sha256(key.encode("utf-8", "replace")).digest()
        # Every key is looked at, so that the time taken tells nothing about any of them.
        names = [name for name, known in self._known if compare_digest(known, digest)]
        if not names:
            raise Unauthenticated("the API key is not valid")
        return names[0]

    def tenant_of_call(self, method: str, metadata: Sequence[tuple[str, str | bytes]] | None) -> str | None:
        """The same for a gRPC call and its metadata."""
        return None if method in OPEN_CALLS else self.tenant(dict(metadata or ()))


class Authenticated:
    """ASGI middleware that turns callers without a valid key away unheard, and notes the tenant of the others."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope["path"]):
            try:
                tenant = self.keys.tenant(Headers(scope=scope))
            except Unauthenticated as error:
                await Problem.of(error).response(scope["path"])(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether anyone may ask for it."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _key_in(headers: Mapping[str, str | bytes]) -> str | None:
    scheme, _, key = str(headers.get("authorization", "")).partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return str(headers.get("x-api-key", "")).strip() or None
