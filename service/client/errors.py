"""What a server's refusals become: the errors of `service.errors` again, and a few that only a client meets.

Unreachable           no server there, or the connection broke and stayed so
UnexpectedAnswer      whatever answered is not a Patchforge server, or one far from this client's version
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from service.errors import PatchforgeError


class Unreachable(PatchforgeError):
    """The server cannot be reached, or went away and did not come back."""

    code = "unreachable"


class UnexpectedAnswer(PatchforgeError):
    """The answer is none that this client knows."""

    code = "unexpected_answer"


def unreachable(url: httpx.URL | str, error: httpx.TransportError) -> Unreachable:
    """What a broken connection is called."""
    return Unreachable(f"no answer from {url}: {str(error) or type(error).__name__}")


def raise_for(response: httpx.Response) -> None:
    """Raises what the server meant, unless it meant well. The body has been read."""
    if response.is_success:
        return
    try:
        body = json.loads(response.content)
        error = _refusal(response, body.get("error") or body)
    except (ValueError, AttributeError):
        raise UnexpectedAnswer(f"{response.url} answered {response.status_code}, without saying why") from None
    raise error


def _refusal(response: httpx.Response, body: dict[str, Any]) -> PatchforgeError:
    code = str(body.get("code"))
    message = str(body.get("detail") or body.get("message") or response.reason_phrase)
    kind = next(
        (kind for kind in _kinds(PatchforgeError) if (kind.code, kind.status) == (code, response.status_code)), None
    )
    retry_after = response.headers.get("retry-after", "")
    error = (kind or PatchforgeError)(
        message,
        field=body.get("field") or body.get("param"),
        retry_after=int(retry_after) if retry_after.isdigit() else None,
    )
    error.status, error.code = response.status_code, code
    return error


def _kinds(root: type[PatchforgeError]) -> Iterator[type[PatchforgeError]]:
    for kind in root.__subclasses__():
        yield kind
        yield from _kinds(kind)
