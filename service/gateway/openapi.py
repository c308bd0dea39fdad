"""The OpenAPI document, and the page `/docs` that shows it without loading anything from other servers."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from patchforge.service.gateway.answers import InferenceError, OpenAIErrorBody, ProblemDetails
from patchforge.service.gateway.auth import is_open
from patchforge.service.gateway.inference.rest import InferRequest
from patchforge.service.gateway.openai.requests import EditRequest, ImagesRequest, JsonEditRequest
from patchforge.service.messages.batches import BatchOptions, BatchRequest, ExpiresAfter
from patchforge.service.messages.schemas import GenerationRequest

PARSED_HERE = (
    GenerationRequest,
    ImagesRequest,
    EditRequest,
    JsonEditRequest,
    InferRequest,
    BatchOptions,
    BatchRequest,
    ExpiresAfter,
)
ANSWERED_HERE = (ProblemDetails, OpenAIErrorBody, InferenceError)
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, if the server requires one."},
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same in another header.",
    },
}
ASSETS = "/docs/assets"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; "
    "script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


class Api(FastAPI):
    """FastAPI whose OpenAPI document also has the request bodies and errors that we handle ourselves."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = self._build_document()
        return self.openapi_schema

    def _build_document(self) -> dict[str, Any]:
        document = get_openapi(
            title=self.title,
            version=self.version,
            description=self.description,
            routes=self.routes,
            separate_input_output_schemas=self.separate_input_output_schemas,
        )
        models = [(model, "validation") for model in (*PARSED_HERE, *ANSWERED_HERE)]
        _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        components = document["components"]
        components["schemas"].update(schemas["$defs"])
        components["securitySchemes"] = KEYS
        for path, operations in document["paths"].items():
            for operation in operations.values():
                _drop_framework_error(operation["responses"])
                if is_open(path):
                    operation["responses"].pop("401", None)
                else:
                    operation["security"] = [{}, *({name: []} for name in KEYS)]
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        return document


def add_docs(app: FastAPI) -> None:
    """Adds Swagger UI at `/docs`, with files from an installed package."""
    app.mount(ASSETS, StaticFiles(directory=str(files("fastapi_offline").joinpath("static"))))

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "")
        page = get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=app.title,
            swagger_js_url=f"{root}{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{root}{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{root}/playground/icon.svg",
        )
        page.headers.update(PAGE_HEADERS)
        return page


def _drop_framework_error(responses: dict[str, Any]) -> None:
    """Removes FastAPI's own 422, which it lists for every operation with parameters and we never send."""
    if "HTTPValidationError" in str(responses.get("422", "")):
        del responses["422"]
