"""One bucket of an S3-compatible object store: put, get, delete, and links that need no API key.

The queue server holds a reference, `s3://bucket/key`, in place of what is stored here. Objects are written whole or not
at all, and under a name that no other attempt uses, so no reader meets half of one or the picture of a lost claim.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NewType, TypeVar

import structlog

from patchforge.service.errors import InvalidRequest, NotFound, ResultsElsewhere, ResultsRefused, ResultsUnavailable
from patchforge.service.results.reasons import is_missing, reason_of
from patchforge.service.settings import Settings

if TYPE_CHECKING:
    from obstore.store import S3Store

T = TypeVar("T")
Reference = NewType("Reference", str)
"""`s3://bucket/key`: where an object is. The queue server holds it."""

OPERATIONS = ("put", "get", "delete", "link")
TIMEOUT = timedelta(seconds=10)  # for one request and its answer
CONNECT_TIMEOUT = timedelta(seconds=2)
RETRIES = 3  # of a request that failed in passing,
RETRY_TIMEOUT = timedelta(seconds=3)  # and only as long: whoever asked has a way to wait of his own
LONGEST_LINK = 7 * 86400  # seconds; S3 accepts no longer ones
PROBE = "start-check"
ADDRESSES = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"
SCHEME = "s3://"

log = structlog.get_logger(__name__)


class ObjectStore:
    """A process's access to the bucket. Any method may raise `ResultsUnavailable`, which says why."""

    def __init__(self, url: str, public_url: str | None, certificates: bytes | None) -> None:
        """`url`: `s3://bucket/prefix`. `public_url`: where clients find the store. `certificates`: PEM, to be trusted.

        Address, region and credentials are those of the usual `AWS_…` variables.

        Raises:
            ModuleNotFoundError: the package obstore is not installed.
            ValueError: an address or a certificate is not valid.
        """
        import obstore
        from obstore.store import S3Store

        self._api: Any = obstore
        self._errors = obstore.exceptions.BaseError, OSError
        self.bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self.place = url
        options: Any = {
            "client_options": {
                "allow_http": True,  # only if the address says so
                "timeout": TIMEOUT,
                "connect_timeout": CONNECT_TIMEOUT,
                **({"root_certificate": certificates} if certificates else {}),
            },
            "retry_config": {"max_retries": RETRIES, "retry_timeout": RETRY_TIMEOUT},
        }
        self._store: S3Store = S3Store(self.bucket, **options)
        public: Any = {"endpoint": public_url, "aws_endpoint_url_s3": public_url} if public_url else {}
        self._public: S3Store = S3Store(self.bucket, **options, **public)
        self._reasons: dict[str, str] = {}
        self.on_call: Callable[[str, float, int, bool], None] = lambda operation, seconds, size, succeeded: None
        """Called after each call with its name in `OPERATIONS`, seconds, bytes, and whether the store could be used."""

    @classmethod
    def open(cls, settings: Settings) -> ObjectStore | None:
        """Returns the store that the settings name; None if results are to be on the queue server.

        Raises:
            InvalidRequest: a package is missing, or a setting cannot be used.
        """
        if not settings.results.startswith(SCHEME):
            return None
        for name in ADDRESSES:  # the client would panic, in a thread of its own
            if (address := os.environ.get(name)) and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", address):
                raise InvalidRequest("must be an address such as https://s3.example.com", field=name)
        certificates = settings.results_tls_ca
        try:
            trusted = certificates.read_bytes() if certificates else None
        except OSError as error:
            message = f"{certificates} cannot be read: {error.strerror}"
            raise InvalidRequest(message, field="PATCHFORGE_RESULTS_TLS_CA") from None
        try:
            return cls(settings.results, settings.results_public_url, trusted)
        except ModuleNotFoundError:
            message = "needs the package obstore, which is not installed: pip install 'patchforge[s3]'"
            raise InvalidRequest(message, field="PATCHFORGE_RESULTS") from None
        except Exception as error:  # its own error classes, or ValueError
            message = f"an AWS_… variable, or the setting itself, is not valid: {str(error).splitlines()[0][:200]}"
            raise InvalidRequest(message, field="PATCHFORGE_RESULTS") from None

    async def check_not_refused(self) -> None:
        """For start-up: writes and reads a small object. The store may be away.

        Raises:
            ResultsRefused: the store answers and refuses this: bucket, region, key or rights are wrong.
        """
        try:
            await self.get(await self.put(PROBE, b"Patchforge can write here.\n", "text/plain"))
        except ResultsRefused:
            raise
        except (ResultsUnavailable, NotFound):
            pass

    async def put(self, name: str, data: bytes, media_type: str, max_age: int = 0) -> Reference:
        """Stores `data` under `name`, below the prefix. Safe to repeat. Caches may keep it for `max_age` seconds."""
        key = self.prefix + name
        about = {"Content-Type": media_type, "Cache-Control": f"private, max-age={max_age}, immutable"}
        await self._call(
            "put", self._api.put_async(self._store, key, data, attributes=about, use_multipart=False), len(data)
        )
        return Reference(f"{SCHEME}{self.bucket}/{key}")

    async def get(self, reference: Reference) -> bytes:
        """Returns an object.

        Raises:
            NotFound: it has expired, or was deleted.
        """
        return await self._call("get", self._read(self._key(reference)))

    async def delete(self, references: Sequence[Reference]) -> None:
        """Deletes objects, if they exist."""
        if references:
            await self._call("delete", self._api.delete_async(self._store, list(map(self._key, references))))

    async def links(self, references: Sequence[Reference], seconds: int) -> list[str]:
        """Returns a link to each object that works without a key, for so many seconds, a week at most."""
        valid = timedelta(seconds=max(1, min(seconds, LONGEST_LINK)))
        signing = self._api.sign_async(self._public, "GET", list(map(self._key, references)), valid)
        return list(await self._call("link", signing))

    async def _read(self, key: str) -> bytes:
        return bytes(await (await self._api.get_async(self._store, key)).bytes_async())

    def _key(self, reference: Reference) -> str:
        key = reference.removeprefix(f"{SCHEME}{self.bucket}/")
        if key == reference:
            raise ResultsElsewhere(f"this is in another object store than {self.place}: {reference}")
        return key

    async def _call(self, operation: str, working: Awaitable[T], size: int = 0) -> T:
        """Waits for a call; turns all errors into ours; logs when the store goes away and comes back."""
        began = time.monotonic()
        try:
            result = await working
        except self._errors as error:
            missing = operation == "get" and is_missing(error)
            self.on_call(operation, time.monotonic() - began, 0, missing)
            if missing:
                self._note(operation, None)
                raise NotFound("it is not in the object store any more") from None
            reason = reason_of(error, self.place, operation)
            self._note(operation, reason.message)
            raise reason from None
        self.on_call(operation, time.monotonic() - began, len(result) if isinstance(result, bytes) else size, True)
        self._note(operation, None)
        return result

    def _note(self, operation: str, reason: str | None) -> None:
        """Logs a line when an operation begins to fail, and one when it succeeds again."""
        if reason == self._reasons.get(operation):
            return
        if reason is None:
            del self._reasons[operation]
            log.info("object store can be used again", operation=operation)
        else:
            self._reasons[operation] = reason
            log.warning("object store cannot be used", operation=operation, reason=reason)
