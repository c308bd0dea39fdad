"""The object store: what it keeps, what its links allow, and how it says why it cannot be used."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from patchforge.service.errors import InvalidRequest, NotFound, ResultsRefused, ResultsUnavailable
from patchforge.service.results import ObjectStore, Reference
from patchforge.service.settings import Settings
from tests.object_store import ADMIN, BUCKET, READER, SECRET, ObjectServer, browse
from tests.service.queue.kit import eventually
from tests.service.queue.test_queue_sentinels import certificates

PNG = b"\x89PNG\r\n\x1a\nnot really"


def opened(settings: Settings, **changes: object) -> ObjectStore:
    store = ObjectStore.open(settings.model_copy(update=changes))
    assert store is not None
    return store


def test_results_are_on_the_queue_server_unless_asked(settings: Settings) -> None:
    assert ObjectStore.open(settings) is None


async def test_objects_are_put_read_linked_and_deleted(stored_apart: Settings, object_server: ObjectServer) -> None:
    store = opened(stored_apart)
    calls: list[tuple[str, int, bool]] = []
    store.on_call = lambda operation, seconds, size, succeeded: calls.append((operation, size, succeeded))
    reference = await store.put("job/0.png", PNG, "image/png", 60)
    assert reference == f"s3://{BUCKET}/results/job/0.png"
    assert await store.get(reference) == PNG
    [link] = await store.links([reference], 60)
    answer = browse(link)
    assert (answer.content, answer.headers["content-type"]) == (PNG, "image/png")
    assert answer.headers["cache-control"] == "private, max-age=60, immutable"
    await store.delete([reference])
    await store.delete([reference])
    with pytest.raises(NotFound):
        await store.get(reference)
    assert browse(link).status_code == 404
    names = [(name, size) for name, size, _ in calls]
    assert names == [("put", 18), ("get", 18), ("link", 0), ("delete", 0), ("delete", 0), ("get", 0)]
    assert all(succeeded for _, _, succeeded in calls)


async def test_a_link_opens_one_object_for_its_time(stored_apart: Settings) -> None:
    store = opened(stored_apart)
    mine = await store.put("mine.png", PNG, "image/png")
    other = await store.put("other.png", b"of someone else", "image/png")
    [link] = await store.links([mine], 1)
    name, elsewhere = mine.rpartition("/")[2], other.rpartition("/")[2]
    for changed in (link.replace(name, elsewhere), link.replace("Expires=1&", "Expires=9000&"), link.partition("?")[0]):
        assert changed != link
        assert browse(changed).status_code == 403
    async with httpx.AsyncClient() as client:
        assert (await client.put(link, content=b"something else")).status_code == 403

    async def refused() -> httpx.Response | None:
        answer = browse(link)
        return None if answer.status_code == 200 else answer

    answer = await eventually(refused)
    assert answer.status_code == 403
    assert "expired" in answer.text
    assert await store.get(mine) == PNG


async def test_a_link_is_to_the_address_that_clients_know(stored_apart: Settings, object_server: ObjectServer) -> None:
    public = f"http://localhost:{object_server.port}"
    store = opened(stored_apart, results_public_url=public)
    [link] = await store.links([await store.put("0.png", PNG, "image/png")], 10**9)
    assert link.startswith(f"{public}/{BUCKET}/results/0.png?")
    assert "X-Amz-Expires=604800&" in link  # S3's limit
    assert browse(link).content == PNG


@pytest.mark.parametrize(
    ("variables", "results", "reason"),
    [
        ({"AWS_ACCESS_KEY_ID": "nobody"}, None, "it does not know the access key: check AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, None, "it does not accept the signature: check AWS_SECRET_ACCESS_KEY"),
        (
            {"AWS_ACCESS_KEY_ID": ADMIN[0], "AWS_SECRET_ACCESS_KEY": ADMIN[1]},
            "s3://no-such-bucket/x",
            "there is no such bucket",
        ),
        (
            {"AWS_ACCESS_KEY_ID": READER[0], "AWS_SECRET_ACCESS_KEY": READER[1]},
            None,
            "these credentials may not put there",
        ),
    ],
)
async def test_what_only_an_operator_can_mend_is_said_at_the_start(
    variables: dict[str, str],
    results: str | None,
    reason: str,
    stored_apart: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    store = opened(stored_apart, results=results or stored_apart.results)
    with pytest.raises(ResultsRefused) as refused:
        await store.check_not_refused()
    assert refused.value.message == f"the object store {store.place} cannot be used: {reason}"
    assert not {SECRET, READER[1], "wrong"} & set(refused.value.message.split())


async def test_a_store_that_is_away_stops_no_start(stored_apart: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = opened(stored_apart)
    await store.check_not_refused()
    with pytest.raises(ResultsUnavailable, match=r"the object store s3://pictures/results cannot be reached"):
        await store.get(Reference(f"s3://{BUCKET}/x"))


async def test_another_bucket_is_not_mistaken_for_ours(stored_apart: Settings) -> None:
    with pytest.raises(ResultsUnavailable, match=r"another object store than s3://pictures/results: s3://else/x"):
        await opened(stored_apart).get(Reference("s3://else/x"))


@pytest.mark.parametrize("results", ["s3:/bucket", "s3://b", "s3://Bucket", "s3://bucket/../x", "gs://bucket", "disk"])
def test_other_places_are_refused_by_name(results: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_RESULTS", results)
    with pytest.raises(ValueError, match="results"):
        Settings()


def test_settings_that_cannot_be_used_are_named(
    stored_apart: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read") as missing:
        opened(stored_apart, results_tls_ca=tmp_path / "none.pem")
    assert missing.value.field == "PATCHFORGE_RESULTS_TLS_CA"
    monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY_BASE64", "?")
    monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "nonsense")
    with pytest.raises(InvalidRequest) as invalid:
        opened(stored_apart)
    assert invalid.value.field == "PATCHFORGE_RESULTS"


async def test_a_store_with_a_certificate_of_its_own(
    stored_apart: Settings, object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, chain, key = certificates(tmp_path)
    with object_server.secured(chain, key) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        trusting = opened(stored_apart, results_tls_ca=authority)
        assert await trusting.get(await trusting.put("tls.png", PNG, "image/png")) == PNG
        with pytest.raises(ResultsRefused, match="its certificate is not trusted: name its CA in PATCHFORGE_RESULTS_T"):
            await opened(stored_apart).check_not_refused()


@pytest.mark.parametrize("address", ["s3.example.com", "not a url", "ftp://s3.example.com", "http://"])
def test_an_address_that_is_none_is_refused(
    address: str, stored_apart: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(InvalidRequest, match="must be an address such as") as refused:
        opened(stored_apart)
    assert refused.value.field == "AWS_ENDPOINT_URL"
