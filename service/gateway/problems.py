"""Every HTTP error as its caller expects it: RFC 9457 problem details, OpenAI's error object, or open inference's."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from service.errors import JobCancelled, JobExpired, JobFailed, NotFound, PatchforgeError, PayloadTooLarge
from service.gateway.validation import describe

OPENAI_PATHS = ("/v1/images", "/v1/models")
INFERENCE_PATHS = ("/v2/",)
LOST = (JobFailed.status, JobCancelled.status, JobExpired.status)
CHALLENGE = 'Bearer realm="patchforge"'
CLIENT_CLOSED_REQUEST = 499  # nginx's word for it; nobody is left to read it but the metrics
FRAMEWORK_CODES: dict[int, str] = {
    HTTPStatus.NOT_FOUND: NotFound.code,
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_TIMEOUT: "request_timeout",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: PayloadTooLarge.code,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type",
}


@dataclass(frozen=True)
class Problem:
    """An error stripped of how it came about."""

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

    def response(self, path: str) -> Response:
        if path.startswith(OPENAI_PATHS):
            return self._openai()
        return self._inference() if path.startswith(INFERENCE_PATHS) else self._problem()

    def _problem(self) -> Response:
        content = {
            "type": f"urn:patchforge:error:{self.code}",
            "title": self.code.replace("_", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "field": self.field,
        }
        return JSONResponse(content, self.status, self._headers(), media_type="application/problem+json")

    def _openai(self) -> Response:
        # OpenAI answers bad fields with 400, and its clients raise BadRequestError only for that.
        status = HTTPStatus.BAD_REQUEST if self.status == HTTPStatus.UNPROCESSABLE_ENTITY else self.status
        headers = self._headers()
        if self.status in LOST:
            headers["x-should-retry"] = "false"  # the official client would run such a job again, twice
        return JSONResponse({"error": self.openai_error()}, status, headers)

    def _inference(self) -> Response:
        status = HTTPStatus.BAD_REQUEST if self.status == HTTPStatus.UNPROCESSABLE_ENTITY else self.status
        message = self.detail if self.field is None else f"{self.field}: {self.detail}"
        return JSONResponse({"error": message}, status, self._headers())

    def openai_error(self) -> dict[str, str | None]:
        kind = "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        return {"message": self.detail, "type": kind, "param": self.field, "code": self.code}

    def _headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": CHALLENGE} if self.status == HTTPStatus.UNAUTHORIZED else {})


def install(app: FastAPI) -> None:
    """Replaces the framework's handlers, which echo the caller's input and stumble over some of it."""

    @app.exception_handler(PatchforgeError)
    async def ours(request: Request, error: PatchforgeError) -> Response:
        return Problem.of(error).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def parameters(request: Request, error: RequestValidationError) -> Response:
        return Problem.of(describe(error.errors(), skip=1)).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        code = FRAMEWORK_CODES.get(error.status_code, "http_error")
        response = Problem(error.status_code, code, error.detail).response(request.url.path)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)  # the server that runs us logs it
    async def unexpected(request: Request, error: Exception) -> Response:
        return Problem(500, "internal_error", "something went wrong on our side").response(request.url.path)
