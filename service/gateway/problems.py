"""HTTP errors in the form each API's clients expect: RFC 9457 problem details, OpenAI's, or open inference's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from patchforge.service.errors import (
    JobCancelled,
    JobExpired,
    JobFailed,
    NotFound,
    PatchforgeError,
    PayloadTooLarge,
    Unavailable,
    Unsupported,
)
from patchforge.service.gateway.prefix import route_path
from patchforge.service.gateway.validation import describe

OPENAI_PATHS = ("/v1/images", "/v1/models", "/v1/files", "/v1/batches")
INFERENCE_PATHS = ("/v2/",)
FINAL = (JobFailed.status, JobCancelled.status, JobExpired.status, Unsupported.status)
CHALLENGE = 'Bearer realm="patchforge"'
CLIENT_CLOSED_REQUEST = 499  # nginx's status for this; only the metrics see it
UNEXPECTED = "unexpected server error: the cause is in the gateway's log"
FRAMEWORK_CODES: dict[int, str] = {
    HTTPStatus.NOT_FOUND: NotFound.code,
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_TIMEOUT: "request_timeout",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: PayloadTooLarge.code,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type",
}


log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Problem:
    """An error, independent of the API that reports it."""

    status: int
    code: str
    detail: str
    field: str | None = None
    retry_after: int | None = None

    @classmethod
    def of(cls, error: PatchforgeError) -> Problem:
        retry_after = error.retry_after
        if retry_after is None and error.status == HTTPStatus.SERVICE_UNAVAILABLE:
            retry_after = 1
        return cls(error.status, error.code, error.message, error.field, retry_after)

    def response(self, scope: Scope) -> Response:
        """The answer to the request with this ASGI scope."""
        path, request_id = route_path(scope), scope.get("state", {}).get("request_id")
        if path.startswith(OPENAI_PATHS):
            return self._openai()
        return self._inference() if path.startswith(INFERENCE_PATHS) else self._problem(request_id)

    def _problem(self, request_id: str | None) -> Response:
        content = self.details(request_id)
        return JSONResponse(content, self.status, self._headers(), media_type="application/problem+json")

    def details(self, request_id: str | None) -> dict[str, str | int | None]:
        """RFC 9457 problem details."""
        return {
            "type": f"urn:patchforge:error:{self.code}",
            "title": self.code.replace("_", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "field": self.field,
            "request_id": request_id,
        }

    def _openai(self) -> Response:
        headers = self._headers()
        if self.status in FINAL:
            headers["x-should-retry"] = "false"  # or OpenAI's client would repeat the call, twice
        return JSONResponse({"error": self.openai_error()}, self.openai_status, headers)

    def _inference(self) -> Response:
        status = HTTPStatus.BAD_REQUEST if self.status == HTTPStatus.UNPROCESSABLE_ENTITY else self.status
        message = self.detail if self.field is None else f"{self.field}: {self.detail}"
        return JSONResponse({"error": message}, status, self._headers())

    @property
    def openai_status(self) -> int:
        """OpenAI answers bad fields with 400, and its clients raise BadRequestError only for that."""
        return HTTPStatus.BAD_REQUEST if self.status == HTTPStatus.UNPROCESSABLE_ENTITY else self.status

    def openai_error(self) -> dict[str, str | None]:
        kind = "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        return {"message": self.detail, "type": kind, "param": self.field, "code": self.code}

    def _headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": CHALLENGE} if self.status == HTTPStatus.UNAUTHORIZED else {})


def install(app: FastAPI) -> None:
    """Replaces the framework's error handlers: they repeat the caller's input, and fail on some of it."""

    @app.exception_handler(PatchforgeError)
    async def handle_ours(request: Request, error: PatchforgeError) -> Response:
        return Problem.of(error).response(request.scope)

    @app.exception_handler(RequestValidationError)
    async def handle_parameters(request: Request, error: RequestValidationError) -> Response:
        return Problem.of(describe(error.errors(), skip=1)).response(request.scope)

    @app.exception_handler(HTTPException)
    async def handle_framework(request: Request, error: HTTPException) -> Response:
        code = FRAMEWORK_CODES.get(error.status_code, "http_error")
        response = Problem(error.status_code, code, error.detail).response(request.scope)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientDisconnect)
    async def handle_disconnect(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


class UnexpectedErrorMiddleware:
    """ASGI middleware that logs and answers what nobody has foreseen.

    The framework would do so outside of all other middleware, so that pages of other origins could not read the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except asyncio.CancelledError:  # the server stops, and the call has used up the time for that
            if started:
                raise
            await Problem.of(Unavailable("the server is shutting down")).response(scope)(scope, receive, send)
        except Exception as error:
            log.error("unexpected error", path=route_path(scope), exc_info=error)
            if started:
                raise
            await Problem(500, "internal_error", UNEXPECTED).response(scope)(scope, receive, send)
