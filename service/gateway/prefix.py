"""The path under which a proxy shows this server: `/images` if its pages are at `https://example.org/images/`."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from patchforge.service.settings import ROOT_PATH

MAX_PREFIX = 200
_PREFIX = re.compile(ROOT_PATH)


def route_path(scope: Scope) -> str:
    """Returns the request's path without the prefix: what the API calls it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class PrefixMiddleware:
    """ASGI middleware that tells the application its prefix, from `X-Forwarded-Prefix` or the settings.

    The header only changes the links in the answer to the request that has it, so anyone may send it. Proxies may
    remove the prefix from the path, or leave it there.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (prefix := self._find_prefix(scope)):
            if scope["path"] == prefix:
                await RedirectResponse(prefix + "/")(scope, receive, send)  # the page's links are relative
                return
            path = scope["path"]
            if not path.startswith(prefix + "/"):
                path = prefix + path  # ASGI wants it complete
            scope = {**scope, "root_path": prefix, "path": path}
        await self.app(scope, receive, send)

    def _find_prefix(self, scope: Scope) -> str:
        # Of several proxies, each adds its own part behind those before it.
        sent = ",".join(Headers(scope=scope).getlist("x-forwarded-prefix"))
        prefix = "".join(part.strip().rstrip("/") for part in sent.split(","))
        return prefix if 0 < len(prefix) <= MAX_PREFIX and _PREFIX.fullmatch(prefix) else self.root_path
