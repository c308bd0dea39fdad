"""The queue through Sentinels with passwords, and through TLS with client certificates."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from patchforge.service.errors import QueueRefused, Unavailable
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from patchforge.service.soak.replicated import HOSTS, NAME, Replicated, Tls
from tests.patience import PATIENCE
from tests.processes import run
from tests.service.queue.kit import a_request, eventually
from tests.service.queue.servers import served
from tests.service.queue.test_queue_masters import connected, works

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

REFUSED = "the Sentinels refuse us: correct the password in PATCHFORGE_REDIS_SENTINEL_PASSWORD_FILE"


async def test_sentinels_and_servers_with_passwords(tmp_path: Path) -> None:
    secret, wrong = tmp_path / "secret", tmp_path / "wrong"
    secret.write_text("of-sentinels\n")
    wrong.write_text("guess")
    known: dict[str, Any] = {"redis_sentinel_password_file": secret}
    with Replicated(tmp_path, sentinel_password="of-sentinels", requirepass="s3cret", databases=4) as servers:
        async with connected(servers.url, **known) as queue:
            await queue.check_server()
            assert await works(queue)
        for settings in ({}, {"redis_sentinel_password_file": wrong}):
            async with connected(servers.url, **settings) as queue:
                with pytest.raises(QueueRefused, match=REFUSED):
                    await queue.ping()
        for changed, why in (
            (servers.url.replace("s3cret", "guess"), "refuses the user or password"),
            (servers.url.replace(NAME, "other"), "the Sentinels know no master of the name in REDIS_URL"),
            (servers.url.removesuffix("/0") + "/7", "no database with the number"),
        ):
            async with connected(changed, **known) as queue:
                with pytest.raises(QueueRefused, match=why):
                    await queue.ping()

        async with connected(servers.url.removesuffix("/0") + "/3", **known) as queue:
            assert await works(queue)
            with servers.master.client(password="s3cret", db=3) as client:
                assert client.dbsize()

            # Two Sentinels are gone: the third one's word is enough to find the master. Then it is gone too.
            for sentinel in servers.sentinels[:2]:
                sentinel.kill()
            async with connected(servers.url, **known) as late:
                assert await works(late)
            servers.sentinels[2].kill()
            assert await works(queue)  # the master still works, and nothing says that it is not the master
            async with connected(servers.url, **known) as late:
                with pytest.raises(Unavailable, match="no Sentinel in REDIS_URL can be reached"):
                    await late.ping()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """Debian's server, which knows TLS, under the name by which it is a server."""
    folder = tmp_path_factory.mktemp("tls")
    found = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    if found is None:
        pytest.skip("no Redis with TLS here: install Debian's redis-tools")
    (folder / "redis-server").symlink_to(found)
    return Tls(str(folder / "redis-server"), *certificates(folder))


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Returns a CA, and a certificate for all hosts with its key."""
    ca, ca_key, cert, key = (folder / name for name in ("ca.crt", "ca.key", "queue.crt", "queue.key"))
    fresh = (
        "openssl",
        "req",
        "-x509",
        "-days",
        "1",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    )
    run(*fresh, "-subj", "/CN=the tests' CA", "-keyout", ca_key, "-out", ca)
    names = ",".join(f"IP:{host}" for host in (*HOSTS, "127.0.0.1"))
    signed = "-CA", ca, "-CAkey", ca_key, "-addext", f"subjectAltName={names}", "-addext", "basicConstraints=CA:FALSE"
    run(*fresh, "-subj", "/CN=queue", *signed, "-keyout", key, "-out", cert)
    return ca, cert, key


def ours(tls: Tls) -> dict[str, Any]:
    return {"redis_tls_ca": tls.ca, "redis_tls_cert": tls.cert, "redis_tls_key": tls.key}


async def test_a_server_with_tls(tls: Tls, tmp_path: Path) -> None:
    with served(tmp_path, tls=tls) as server:
        url, port = server.url, server.port
        async with connected(url, **ours(tls)) as queue:
            assert await works(queue)
        async with connected(url) as queue:
            with pytest.raises(QueueRefused, match=r"certificate is not trusted \(.*\): name its CA in PATCHFORGE_"):
                await queue.ping()
        async with connected(f"rediss://localhost:{port}", **ours(tls)) as queue:
            with pytest.raises(QueueRefused, match=r"not trusted \(Hostname mismatch.*localhost"):
                await queue.ping()
        async with connected(url, redis_tls_ca=tls.ca) as queue:
            with pytest.raises(QueueRefused, match=r"refuses our certificate .*: set PATCHFORGE_REDIS_TLS_CERT"):
                await queue.ping()
        async with connected(f"redis://127.0.0.1:{port}") as queue:
            with pytest.raises(Unavailable):
                await queue.ping()


async def test_a_server_without_tls(tls: Tls) -> None:
    """One that answers. Redis itself waits for the rest of what it takes for a command, and counts as not reachable."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"-ERR what?\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with connected(f"rediss://127.0.0.1:{port}", **ours(tls)) as queue:
            with pytest.raises(QueueRefused, match="does not use TLS: redis:// instead of rediss://"):
                await queue.ping()


async def test_sentinels_with_tls_over_a_failover(tls: Tls, tmp_path: Path) -> None:
    with Replicated(tmp_path, tls=tls) as servers:
        queue = JobQueue.connect(servers.url, Settings.model_validate(ours(tls)))
        try:
            assert await works(queue)
            old = servers.master
            old.kill()
            servers.new_master(old)

            async def answers() -> bool:
                with contextlib.suppress(Unavailable):  # until it has noticed that the old one is gone
                    await queue.ping()
                    return True
                return False

            await eventually(answers)
            assert await works(queue)
        finally:
            await queue.close()
        async with connected(servers.url) as stranger:
            with pytest.raises(QueueRefused, match="certificate is not trusted"):
                await stranger.submit(a_request())
