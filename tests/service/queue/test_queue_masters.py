"""The queue is used on its master only, wherever that is, and `Unavailable` says what is wrong with a server."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.crc import key_slot

from patchforge.service.embedded import EmbeddedServer, free_port
from patchforge.service.errors import InvalidRequest, QueueRefused, Unavailable
from patchforge.service.messages.schemas import Job
from patchforge.service.queue import JobQueue, keys
from patchforge.service.queue.reasons import LOADING, NOT_MASTER
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.processes import eventually, stop
from tests.service.queue.kit import DONE, a_request, claimed, watched
from tests.service.queue.servers import Server, served

SLOT = key_slot(keys.TAG.encode())


@asynccontextmanager
async def connected(url: str, **settings: Any) -> AsyncIterator[JobQueue]:
    queue = JobQueue.connect(url, Settings(redis_url=url, **settings))
    try:
        yield queue
    finally:
        await queue.close()


async def works(queue: JobQueue) -> bool:
    """Takes one job through the queue."""
    job = await queue.submit(a_request())
    claim = await queue.claim("w", ["emoji"], block_seconds=1)
    assert claim is not None
    assert claim.job.id == job.id
    assert await queue.finish(claim, DONE)
    return (await watched(queue, job.id))[-1][1].type == "completed"


async def test_a_replica_is_refused(tmp_path: Path) -> None:
    with served(tmp_path) as server, server.client() as admin:
        async with connected(server.url) as queue:
            assert await works(queue)
            admin.replicaof("127.0.0.1", "1")  # type: ignore[no-untyped-call]
            with pytest.raises(Unavailable, match=NOT_MASTER):
                await queue.submit(a_request())  # on a connection from before
            with pytest.raises(Unavailable, match=NOT_MASTER):
                await queue.ping()  # on a new one, even for a command that a replica would run
            admin.replicaof("NO", "ONE")  # type: ignore[no-untyped-call]
            assert await works(queue)


async def test_a_server_that_loads_its_data(tmp_path: Path) -> None:
    with served(tmp_path) as server, server.client() as admin:
        for number in range(2000):
            admin.set(f"key-{number}", "x" * 100)
        admin.save()
    slow = "--key-load-delay", 5_000, "--loading-process-events-interval-bytes", 1024
    with served(tmp_path, *slow, patient=False) as server:

        def loading() -> bool:
            try:
                with server.client() as client:
                    return bool(client.info("persistence")["loading"])
            except OSError:
                return False

        eventually(loading)
        async with connected(server.url) as queue:
            with pytest.raises(Unavailable, match=LOADING):
                await queue.ping()


async def test_a_server_with_too_few_replicas_takes_no_jobs(tmp_path: Path) -> None:
    with served(tmp_path, "--min-replicas-to-write", 1) as server:
        async with connected(server.url) as queue:
            await queue.check_server()
            with pytest.raises(Unavailable, match="min-replicas-to-write"):
                await queue.submit(a_request())


async def accepted(queue: JobQueue, key: str) -> Job:
    """Submits with this key until the replica, which may be slow, has confirmed it in time."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with suppress(Unavailable):
                return await queue.submit(a_request(), idempotency_key=key)


async def test_a_job_is_accepted_when_replicas_have_it(tmp_path: Path) -> None:
    with served(tmp_path / "a") as server:
        async with connected(server.url, redis_wait_replicas=1) as queue:
            with pytest.raises(Unavailable, match="1 of 1 replicas have not confirmed this"):
                await queue.submit(a_request(), idempotency_key="k")
            with served(tmp_path / "b", "--replicaof", f"127.0.0.1 {server.port}") as replica:
                eventually(lambda: follows(replica))
                job = await accepted(queue, "k")
                with replica.client() as there:
                    assert there.exists(keys.job(job.id))
                assert (await queue.waiting()) == {"emoji": 1}  # the first try had made it
                count, behind = await queue.replication()
                assert count == 1
                assert behind >= 0


async def test_a_retry_is_accepted_no_sooner_than_the_job(tmp_path: Path) -> None:
    with served(tmp_path / "a") as server, served(tmp_path / "b", "--replicaof", f"127.0.0.1 {server.port}") as replica:
        eventually(lambda: follows(replica))
        async with connected(server.url, redis_wait_replicas=1) as queue:
            await queue.submit(a_request())
            stop(replica.process.pid)
            for _ in range(2):  # the second time at another gateway, whose connection has written nothing
                async with connected(server.url, redis_wait_replicas=1) as gateway:
                    with pytest.raises(Unavailable, match="1 of 1 replicas have not confirmed this"):
                        await gateway.submit(a_request(), idempotency_key="k")
            replica.process.send_signal(signal.SIGCONT)
            await accepted(queue, "k")


async def test_jobs_that_a_failover_lost_are_found_once(tmp_path: Path) -> None:
    with served(tmp_path / "a") as server, served(tmp_path / "b", "--replicaof", f"127.0.0.1 {server.port}") as replica:
        eventually(lambda: follows(replica))
        async with connected(server.url, redis_wait_replicas=1) as queue:
            assert await queue.lost_jobs() == []
            kept = await queue.submit(a_request())
            with server.client() as old, replica.client() as new:
                new.replicaof("NO", "ONE")
                old.config_set("min-replicas-to-write", 0)
                lost = [await submitted_unconfirmed(queue) for _ in range(2)]
                assert await queue.lost_jobs() == [], "nothing has happened to the server that is used"
                old.replicaof("127.0.0.1", replica.port)
                eventually(lambda: follows(server))
                old.replicaof("NO", "ONE")
                assert sorted(await queue.lost_jobs()) == sorted(lost)
                assert await queue.lost_jobs() == []
                assert (await queue.get(kept.id)).id == kept.id


async def submitted_unconfirmed(queue: JobQueue) -> str:
    """A job that was accepted although the next master does not have it."""
    wait, queue._wait_replicas = queue._wait_replicas, 0
    job = await queue.submit(a_request())
    queue._wait_replicas = wait
    return job.id


def follows(replica: Server) -> bool:
    with replica.client() as client:
        return client.info("replication")["master_link_status"] == "up"


async def test_a_password_that_changes(queue_server: EmbeddedServer, redis_client: Any, tmp_path: Path) -> None:
    """New connections use the new password; no process is started again."""
    file = tmp_path / "password"
    rules = "~{patchforge}*", "&{patchforge}*", "+@all"
    await redis_client.execute_command("ACL", "SETUSER", "patchforge", "on", ">old", *rules)
    url = queue_server.url.replace("//", "//patchforge:ignored@")
    async with connected(url, redis_password_file=file) as queue:
        with pytest.raises(Unavailable, match="PATCHFORGE_REDIS_PASSWORD_FILE cannot be read: No such file"):
            await queue.ping()
        file.write_text("old\n")
        assert await works(queue)
        await redis_client.execute_command("ACL", "SETUSER", "patchforge", "<old", ">new")
        await redis_client.client_kill_filter(user="patchforge")
        with pytest.raises(QueueRefused, match="the user or password in REDIS_URL or PATCHFORGE_REDIS_PASSWORD_FILE"):
            await queue.ping()
        file.write_text("new\n")
        assert await works(queue)
    await redis_client.execute_command("ACL", "DELUSER", "patchforge")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"redis_tls_ca": "ca.pem"}, "cannot use ca.pem: No such file"),
        ({"redis_tls_cert": "cert.pem"}, "cannot use cert.pem: No such file"),
        ({"redis_tls_key": "key.pem"}, "is set without PATCHFORGE_REDIS_TLS_CERT"),
    ],
)
def test_files_that_cannot_be_used(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        JobQueue.connect("rediss://queue.test", Settings.model_validate(settings))


def test_a_certificate_for_a_server_without_tls() -> None:
    with pytest.raises(InvalidRequest, match="REDIS_URL does not begin with rediss"):
        JobQueue.connect("redis://queue.test", Settings(redis_tls_ca=Path("ca.pem")))


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[Server, Server]]:
    """Two nodes that know each other. The first one owns all slots."""
    enabled = "--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", "--cluster-port"
    with served(folder / "a", *enabled, free_port()) as owner, served(folder / "b", *enabled, free_port()) as other:
        with owner.client() as first, other.client() as second:
            first.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            bus = first.config_get("cluster-port")["cluster-port"]
            second.execute_command("CLUSTER", "MEET", "127.0.0.1", owner.port, bus)
            eventually(lambda: all(len(nodes(each)) == 2 for each in (first, second)), "the nodes to meet")
            eventually(lambda: owns(second, first), "the second node to learn who owns the slots")
            eventually(lambda: all(is_up(each) for each in (first, second)), "the cluster")
        yield owner, other


def is_up(client: Redis) -> bool:
    return client.execute_command("CLUSTER INFO")["cluster_state"] == "ok"  # type: ignore[no-any-return]


def nodes(client: Redis) -> list[Any]:
    return client.execute_command("CLUSTER", "SHARDS")


def owns(asked: Redis, owner: Redis) -> bool:
    """Whether one node knows that the other owns the queue's slot."""
    identity = owner.execute_command("CLUSTER", "MYID")
    return any(slot[0] <= SLOT <= slot[1] and slot[2][2] == identity for slot in asked.execute_command("CLUSTER SLOTS"))


async def test_the_node_of_a_cluster_that_has_the_queue_is_found(tmp_path: Path) -> None:
    with cluster(tmp_path) as (owner, other), owner.client() as first, other.client() as second:
        async with connected(other.url) as queue, connected(owner.url) as sure:
            await queue.check_server()
            assert await works(queue)
            assert await works(sure)

            # The slot moves. While it does, what is not there any more is asked for at its new place; but a command of
            # several keys must wait.
            for name in first.scan_iter("*"):
                first.delete(name)
            identity = second.execute_command("CLUSTER", "MYID")
            second.execute_command("CLUSTER", "SETSLOT", SLOT, "IMPORTING", first.execute_command("CLUSTER", "MYID"))
            first.execute_command("CLUSTER", "SETSLOT", SLOT, "MIGRATING", identity)
            job = await sure.submit(a_request())
            assert second.dbsize() > 0
            with pytest.raises(Unavailable, match="the queue is moving"):
                await sure.claim("w", ["emoji"], block_seconds=0)
            for node in (second, first):
                node.execute_command("CLUSTER", "SETSLOT", SLOT, "NODE", identity)
            assert (await claimed(sure)).job.id == job.id
            assert await works(queue)
            assert first.dbsize() == 0


async def test_a_cluster_node_that_is_gone_is_asked_no_more(tmp_path: Path) -> None:
    with cluster(tmp_path) as (owner, other), other.client() as second:
        async with connected(other.url) as queue:
            assert await works(queue)
            owner.process.kill()
            with pytest.raises(Unavailable):
                await queue.submit(a_request())
            second.execute_command("CLUSTER", "FORGET", node_of(second, owner))
            second.execute_command("CLUSTER", "ADDSLOTS", SLOT)
            eventually(lambda: is_up(second), "the cluster")
            assert await works(queue)  # the node in the URL has the queue now


def node_of(client: Redis, server: Server) -> str:
    [identity] = [each[2][2] for each in client.execute_command("CLUSTER SLOTS") if each[2][1] == server.port]
    return str(identity.decode())


async def test_a_database_in_a_cluster(tmp_path: Path) -> None:
    with cluster(tmp_path) as (owner, _):
        async with connected(f"{owner.url}/5") as queue:
            with pytest.raises(QueueRefused, match="no database with the number"):
                await queue.ping()


async def test_what_is_claimed_stays_claimed_over_a_redirection(tmp_path: Path) -> None:
    """A command that was redirected ran once."""
    with cluster(tmp_path) as (_, other):
        async with connected(other.url) as queue:
            job = await queue.submit(a_request())
            assert (await claimed(queue)).job.id == job.id
            assert await queue.waiting() == {}
