"""The OpenAPI document, and the page that shows it offline."""

from __future__ import annotations

import re

import httpx

REFUSALS = {
    ("post", "/v1/jobs"): {"401", "404", "408", "413", "415", "422", "429", "500", "503"},
    ("get", "/v1/jobs/{job_id}/events"): {"400", "401", "404", "503"},
    ("get", "/v1/jobs/{job_id}/image"): {"304", "401", "404", "409", "422", "503"},
    ("post", "/v1/images/generations"): {"400", "401", "404", "408", "409", "413", "415", "429", "500", "503", "504"},
    ("post", "/v1/images/edits"): {"400", "401", "404", "408", "409", "413", "415", "429", "500", "503", "504"},
    ("post", "/v1/files"): {"400", "401", "408", "413", "415", "500", "503"},
    ("post", "/v1/batches"): {"400", "401", "404", "408", "413", "415", "429", "500", "503"},
    ("get", "/v1/files/{file_id}/content"): {"200", "401", "404", "503"},
    ("delete", "/v1/batches/{batch_id}"): {"401", "404", "409", "503"},
    ("post", "/v2/models/{name}/infer"): {"400", "401", "404", "408", "409", "413", "415", "429", "500", "503"},
}


async def test_every_answer_is_described(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    for (method, path), statuses in REFUSALS.items():
        assert statuses <= document["paths"][path][method]["responses"].keys(), path
    text = str(document)
    assert "HTTPValidationError" not in text, "the framework's own error is never sent"
    known = document["components"]["schemas"].keys()
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) <= known
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert form["schema"]["$ref"].endswith("EditRequest")
    assert document["components"]["securitySchemes"].keys() == {"bearer", "x-api-key"}
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert "security" not in document["paths"][path]["get"], path
        assert "401" not in document["paths"][path]["get"]["responses"], path


async def test_the_page_asks_nothing_of_anyone_else(http: httpx.AsyncClient) -> None:
    page = await http.get("/docs")
    assert page.status_code == 200
    sources = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page.text)
    assert len(sources) >= 4
    for source in sources:
        assert source.startswith("/"), source
        assert (await http.get(source)).status_code == 200, source
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert (await http.get("/redoc")).status_code == 404
