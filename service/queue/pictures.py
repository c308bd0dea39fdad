"""Where the pictures of jobs are: on the queue server itself, or in an object store that it has references to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from redis.asyncio import Redis

from patchforge.service.errors import ResultsUnavailable
from patchforge.service.messages.protocol import OBJECT_STORE
from patchforge.service.messages.schemas import MAX_IMAGES, Job
from patchforge.service.messages.source import Source
from patchforge.service.queue import keys
from patchforge.service.queue.connection import QueueConnection, redis_call
from patchforge.service.results import ObjectStore, Reference
from patchforge.service.settings import Settings


class PictureStore(QueueConnection):
    """Pictures of jobs. With an object store, any method may raise `ResultsUnavailable` too."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        super().__init__(redis, blocking, settings)
        self.objects = ObjectStore.open(settings)
        """None: pictures are on the queue server."""
        self._result_ttl = settings.result_ttl_seconds

    async def check_not_refused(self) -> None:
        await super().check_not_refused()
        if self.objects is not None:
            await self.objects.check_not_refused()

    async def picture_links(self, job_id: str) -> dict[int, str]:
        """Returns index → link that needs no API key, for pictures in the object store. They expire with the job."""
        if self.objects is None:
            return {}
        found = await self._do("HMGET", keys.images(job_id), *map(reference_field, range(MAX_IMAGES)))
        references = {index: Reference(each.decode()) for index, each in enumerate(found) if each is not None}
        if not references:
            return {}
        left = int(await self._do("TTL", keys.images(job_id)))
        links = await self.objects.links(list(references.values()), left if left > 0 else self._result_ttl)
        return dict(zip(references, links, strict=True))

    async def discard_picture(self, picture: bytes | Reference) -> None:
        """Deletes from the object store what the queue server did not take. If this fails, it expires there."""
        if isinstance(picture, str):
            with suppress(ResultsUnavailable):
                await self._store().delete([picture])

    async def _put_picture(self, job: Job, index: int, data: bytes, attempt: str) -> Reference:
        """Stores a picture under a name of this attempt only: a worker that lost its claim must not replace it."""
        kind = job.request.output_format
        name = f"{job.id}/{index}-{attempt}.{kind}"
        return await self._store().put(name, data, f"image/{kind}", self._result_ttl)

    async def _read_picture(self, job_id: str, index: int) -> bytes | None:
        """Returns a picture, or None if there is none.

        Raises:
            NotFound: it is not in the object store any more.
        """
        data, reference = await self._do("HMGET", keys.images(job_id), index, reference_field(index))
        return data if reference is None else await self._store().get(Reference(reference.decode()))

    async def _delete_pictures(self, job_ids: Sequence[str]) -> None:
        """Deletes what jobs have in the object store."""
        if self.objects is None:
            return
        with redis_call():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for job_id in job_ids:
                    pipeline.hmget(keys.images(job_id), list(map(reference_field, range(MAX_IMAGES))))
                    pipeline.hmget(keys.sources(job_id), list(map(reference_field, ("image", "mask"))))
                found = await pipeline.execute()
        await self.objects.delete([Reference(each.decode()) for fields in found for each in fields if each is not None])

    def source_needs(self, source: Source | None) -> frozenset[str]:
        """Returns the capabilities that a worker needs to get at a job's picture to edit."""
        return frozenset() if source is None or self.objects is None else frozenset({OBJECT_STORE})

    async def _keep_source(self, job_id: str, source: Source | None) -> list[str | bytes]:
        """Returns the fields of a job's picture to edit, names and values in turn: bytes, or references to objects."""
        if source is None or self.objects is None:
            return source_fields(source)
        fields: list[str | bytes] = []
        for name, data in ("image", source.image), ("mask", source.mask):
            if data is not None:
                fields += [reference_field(name), await self.objects.put(f"{job_id}/{name}.png", data, "image/png")]
        return fields

    async def _discard_source(self, fields: Sequence[str | bytes]) -> None:
        """Deletes what `_keep_source` put into the object store, if no job came of it."""
        references = [
            Reference(str(value))
            for name, value in zip(fields[::2], fields[1::2], strict=True)
            if str(name).startswith(keys.REFERRED)
        ]
        if references:
            with suppress(ResultsUnavailable):  # then they expire there
                await self._store().delete(references)

    async def _read_source(self, job_id: str) -> Source | None:
        """Returns the picture that a job edits, or None if there is none.

        Raises:
            NotFound: it is not in the object store any more.
        """
        names = "image", "mask", reference_field("image"), reference_field("mask")
        found: list[bytes | None] = await self._do("HMGET", keys.sources(job_id), *names)
        image, mask = [
            here if there is None else await self._store().get(Reference(there.decode()))
            for here, there in zip(found[:2], found[2:], strict=True)
        ]
        return None if image is None else Source(image, mask)

    def _store(self) -> ObjectStore:
        if self.objects is None:
            message = "this is in an object store, which this process may not use: set PATCHFORGE_RESULTS here too"
            raise ResultsUnavailable(message)
        return self.objects


def reference_field(name: int | str) -> str:
    return f"{keys.REFERRED}{name}"


def source_fields(source: Source | None) -> list[str | bytes]:
    """Returns names and values in turn."""
    if source is None:
        return []
    fields: list[str | bytes] = ["image", source.image]
    return fields if source.mask is None else [*fields, "mask", source.mask]
