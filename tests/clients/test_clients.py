"""Real clients from their registries, each in an environment of its own, against a live server: make test-clients."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients.matrix import CLIENTS, PROMETHEUS, PROXIED, Client, Outcome
from tests.e2e.conftest import Served
from tests.processes import eventually, launch, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_client(served: Served, outcomes: list[Outcome], client: Client) -> None:
    if client.script.endswith(".mjs") and shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    outcomes.append(client.run(served.http, served.grpc))
    assert outcomes[-1].works
    assert outcomes[-1].fails == {}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


@pytest.fixture
def nginx(served: Served, tmp_path: Path) -> Iterator[str]:
    """nginx before the server, set up as most people do: nothing but where to pass requests on."""
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "\n".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    (tmp_path / "nginx.conf").write_text(
        f"""daemon off; pid {tmp_path}/pid; error_log stderr;
        events {{}}
        http {{
          access_log off; {places}
          server {{
            listen 127.0.0.1:{port};
            location / {{ proxy_pass {served.http}; proxy_set_header Host $http_host; }}
          }}
        }}"""
    )
    process = launch(program, "-p", tmp_path, "-c", tmp_path / "nginx.conf", cwd=tmp_path)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: answers(f"{url}/readyz"), "nginx")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_through_nginx(served: Served, nginx: str, outcomes: list[Outcome]) -> None:
    made = PROXIED.run(nginx, served.grpc)
    version = run("nginx", "-v").stderr.partition("nginx/")[2].split()[0]
    outcomes.append(Outcome(made.title, made.versions | {"nginx": version}, made.works, made.fails))
    assert made.fails == {}


def test_prometheus_scrapes_all_metrics(served: Served, tmp_path: Path, outcomes: list[Outcome]) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    port = free_port()
    target = served.http.removeprefix("http://")
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: patchforge, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    where = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    process = launch(program, *where, f"--web.listen-address=127.0.0.1:{port}", cwd=tmp_path)
    try:

        def ask(query: str) -> list[dict[str, list[str]]]:
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query})
            found: list[dict[str, list[str]]] = answer.json()["data"]["result"]
            return found

        def scraped() -> bool:
            try:
                return bool(ask("up == 1") and ask("patchforge_workers == 1"))
            except httpx.TransportError:
                return False

        eventually(scraped, "a scrape")
        assert ask("patchforge_http_requests_total"), "counters arrive under their names"
        text = httpx.get(f"{served.http}/metrics").text
        assert run("promtool", "check", "metrics", text=text, status=None).returncode in (0, 3), "3: only style"
    finally:
        process.terminate()
        process.wait(30)
    version = run(program, "--version", status=0)
    number = (version.stdout + version.stderr).partition("version ")[2].split()[0]
    checks = ["scrape of `/metrics`", "`promtool check metrics`"]
    outcomes.append(Outcome(PROMETHEUS, {"prometheus": number}, checks, {}))
