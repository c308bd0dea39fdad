"""The application's description of itself, and the page that shows it, which needs nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from service.gateway.answers import InferenceError, OpenAIErrorBody, ProblemDetails
from service.gateway.auth import is_open
from service.gateway.images_request import EditRequest, ImagesRequest
from service.gateway.inference_rest import InferRequest
from service.schemas import GenerationRequest

PARSED_HERE = (GenerationRequest, ImagesRequest, EditRequest, InferRequest)
ANSWERED_HERE = (ProblemDetails, OpenAIErrorBody, InferenceError)
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, where the server asks for one."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same, in another place."},
}
ASSETS = "/docs/assets"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; "
    "script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


class Api(FastAPI):
    """FastAPI that also describes the bodies we parse and the errors we shape ourselves."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = self._described()
        return self.openapi_schema

    def _described(self) -> dict[str, Any]:
        document = get_openapi(
            title=self.title,
            version=self.version,
            description=self.description,
            routes=self.routes,
            separate_input_output_schemas=self.separate_input_output_schemas,
        )
        models = [(model, "validation") for model in (*PARSED_HERE, *ANSWERED_HERE)]
        _, described = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        components = document["components"]
        components["schemas"].update(described["$defs"])
        components["securitySchemes"] = KEYS
        for path, operations in document["paths"].items():
            for operation in operations.values():
                _drop_the_frameworks_error(operation["responses"])
                if is_open(path):
                    operation["responses"].pop("401", None)
                else:
                    operation["security"] = [{}, *({name: []} for name in KEYS)]
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        return document


def add_docs(app: FastAPI) -> None:
    """Swagger UI at ``/docs``, from files of a package that ships them."""
    app.mount(ASSETS, StaticFiles(directory=str(files("fastapi_offline").joinpath("static"))))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url=app.openapi_url or "",
            title=app.title,
            swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{ASSETS}/swagger-ui.css",
            swagger_favicon_url="/playground/icon.svg",
        )
        page.headers.update(PAGE_HEADERS)
        return page


def _drop_the_frameworks_error(responses: dict[str, Any]) -> None:
    """FastAPI announces an error of its own wherever there is a parameter; we never answer it."""
    if "HTTPValidationError" in str(responses.get("422", "")):
        del responses["422"]
