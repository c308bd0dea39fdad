"""Turns answers of a server into the errors of `patchforge.service.errors`; adds two that only a client meets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from patchforge.service.errors import PatchforgeError


class Unreachable(PatchforgeError):
    """The server cannot be reached, or the connection broke and could not be restored."""

    code = "unreachable"


class UnexpectedAnswer(PatchforgeError):
    """The answer does not come from a Patchforge server, or its version differs too much from this client's."""

    code = "unexpected_answer"


def unreachable(url: httpx.URL | str, error: httpx.TransportError) -> Unreachable:
    """The error for a failed connection."""
    return Unreachable(f"no answer from {url}: {str(error) or type(error).__name__}")


def raise_for(response: httpx.Response) -> None:
    """Raise the error of an answer, if it is one. Its body must have been read.

    Raises:
        PatchforgeError: the server refused the request.
        UnexpectedAnswer: the body is not an error of this API.
    """
    if response.is_success:
        return
    try:
        body = json.loads(response.content)
        error = _refusal(response, body.get("error") or body)
    except (ValueError, AttributeError):
        raise UnexpectedAnswer(f"{response.url} answered {response.status_code} without a readable reason") from None
    raise error


def _refusal(response: httpx.Response, body: dict[str, Any]) -> PatchforgeError:
    code = str(body.get("code"))
    message = str(body.get("detail") or body.get("message") or response.reason_phrase)
    status = response.status_code
    if status == httpx.codes.BAD_REQUEST and "param" in body:  # an OpenAI endpoint says 400 for any wrong field
        status = httpx.codes.UNPROCESSABLE_ENTITY
    kind = next((kind for kind in _kinds(PatchforgeError) if (kind.code, kind.status) == (code, status)), None)
    retry_after = response.headers.get("retry-after", "")
    error = (kind or PatchforgeError)(
        message,
        field=body.get("field") or body.get("param"),
        retry_after=int(retry_after) if retry_after.isdigit() else None,
    )
    error.status, error.code = status, code
    return error


def _kinds(root: type[PatchforgeError]) -> Iterator[type[PatchforgeError]]:
    for kind in root.__subclasses__():
        yield kind
        yield from _kinds(kind)
