"""Converts what Redis holds into messages. `messages/reading.py` explains records of other versions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import structlog
from pydantic import TypeAdapter
from pydantic_core import from_json, to_json

from patchforge.service.messages.events import Event
from patchforge.service.messages.protocol import FIRST, PROTOCOL, Announcement, CardDetails, split_card, whole_card
from patchforge.service.messages.reading import Unreadable, read, written
from patchforge.service.messages.schemas import (
    GenerationRequest,
    Job,
    JobError,
    JobStatus,
    ModelCard,
    SavingsReport,
)

T = TypeVar("T")

EVENT: TypeAdapter[Event] = TypeAdapter(Event)

_CARD = TypeAdapter(ModelCard)
_ANNOUNCEMENT = TypeAdapter(Announcement)
_REQUEST = TypeAdapter(GenerationRequest)
_ERROR = TypeAdapter(JobError)
_REPORT = TypeAdapter(SavingsReport)
_TRACE = TypeAdapter(dict[str, str])

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Served:
    """What a live worker announced, as far as this process can read it."""

    cards: Sequence[ModelCard] = ()
    capabilities: frozenset[str] = FIRST
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Names of its other models → why their cards cannot be read here."""


def announced(cards: Sequence[ModelCard], capabilities: Collection[str]) -> tuple[str, str]:
    """Returns the two texts that `served_from` reads."""
    split = {card.name: split_card(card) for card in cards}
    details = {name: rest for name, (_, rest) in split.items()}
    about = Announcement(protocol=PROTOCOL, capabilities=sorted(capabilities), details=details)
    plain = ",".join(written(card) for card, _ in split.values())
    return f"[{plain}]", written(about)


@lru_cache(maxsize=2048)
def served_from(cards: bytes, announcement: bytes) -> Served:
    """Returns what a worker announced. Cached, because every submit reads it and it rarely changes.

    `announcement` is empty for a worker of protocol 0. Unreadable parts are logged.
    """
    refused = None
    capabilities, details = FIRST, dict[str, CardDetails]()
    try:
        if announcement:
            announced = read(_ANNOUNCEMENT, announcement, "announcement")
            refused = _refuse_newer(announced.protocol)
            capabilities, details = frozenset(announced.capabilities), announced.details
    except Unreadable as error:
        refused = str(error)
    legible, unreadable = [], {}
    for name, text in _card_texts(cards):
        try:
            if refused is not None:
                raise Unreadable(refused)
            legible.append(whole_card(read(_CARD, text, "card"), details.get(name)))
        except Unreadable as error:
            unreadable[name] = str(error)
            log.warning("a worker's model cannot be used: its card cannot be read", reason=str(error))
    return Served(legible, capabilities, unreadable)


def _card_texts(cards: bytes) -> list[tuple[str, bytes]]:
    """Splits a JSON list of cards into (model name, card); the name is empty if a card has none."""
    try:
        found = from_json(cards)
    except ValueError:
        found = None
    if not isinstance(found, list):
        log.warning("a worker's models cannot be used: its announcement is not a list")
        return []
    names = [card.get("name") if isinstance(card, dict) else None for card in found]
    return [(name if isinstance(name, str) else "", to_json(card)) for name, card in zip(names, found, strict=True)]


def fields_of(record: Sequence[bytes]) -> dict[str, bytes]:
    """Converts a hash as scripts return it: names and values in turn."""
    return {name.decode(errors="replace"): value for name, value in zip(record[::2], record[1::2], strict=True)}


def event_from(entry: Sequence[bytes]) -> Event | None:
    """Returns the event in an entry of a job's stream (names and values in turn), or None if it cannot be read."""
    try:
        return read(EVENT, fields_of(entry).get("event", b""), "event")
    except Unreadable:
        return None


def job_from(record: Sequence[bytes]) -> Job:
    """Returns the job that a record describes.

    If part of it cannot be read, `unreadable` says why, and placeholders stand for that part. So any process can
    expire, cancel or give up a job of another version.
    """
    return _Reader(fields_of(record)).job()


def with_digest(report: SavingsReport, digest: bytes | None) -> SavingsReport:
    """Returns a report with the digest that `JobQueue.finish` wrote apart from it."""
    return report if digest is None else report.model_copy(update={"model_digest": digest.decode(errors="replace")})


class _Reader:
    """Reads a record part by part."""

    def __init__(self, fields: Mapping[str, bytes]) -> None:
        self.fields = fields
        self.trouble: list[str] = []

    def job(self) -> Job:
        fields = self.fields
        if later := _refuse_newer(self.number("protocol")):
            self.trouble.append(later)
        model = fields.get("model", b"").decode(errors="replace")
        request = self.message(_REQUEST, "request")
        if request is None:
            self.trouble.append("request: is missing")
            request = GenerationRequest.model_construct(model=model, prompt="")
        status = fields.get("status", b"").decode(errors="replace")
        if status not in list(JobStatus):
            self.trouble.append("status: is of an unknown kind")
            status = JobStatus.RUNNING
        return Job(
            id=fields.get("id", b"").decode(errors="replace"),
            status=JobStatus(status),
            request=request,
            created_at=self.number("created_at"),
            started_at=self.number("started_at") if "started_at" in fields else None,
            finished_at=self.number("finished_at") if "finished_at" in fields else None,
            attempt=int(self.number("attempt")),
            error=self.message(_ERROR, "error"),
            report=self.report(),
            tenant=fields["tenant"].decode(errors="replace") if "tenant" in fields else None,
            trace=self.trace(),
            degradable=fields.get("degradable") == b"1",
            quiet=fields.get("quiet") == b"1",
            claimed_at=self.number("claimed_at") if "claimed_at" in fields else None,
            unreadable=self.trouble[0] if self.trouble else None,
        )

    def number(self, name: str) -> float:
        """Returns 0 if the field is missing or unreadable."""
        try:
            number = float(self.fields.get(name, b"0"))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.trouble.append(f"{name}: is not a number")
            return 0.0
        return number

    def message(self, kind: TypeAdapter[T], name: str) -> T | None:
        """Returns None if the field is missing or unreadable."""
        if name not in self.fields:
            return None
        try:
            return read(kind, self.fields[name], name)
        except Unreadable as error:
            self.trouble.append(str(error))
            return None

    def report(self) -> SavingsReport | None:
        """Returns None if it is missing or unreadable."""
        report = self.message(_REPORT, "report")
        return report and with_digest(report, self.fields.get("digest"))

    def trace(self) -> dict[str, str]:
        """Returns {} if the field is missing or unreadable: a job does not need its trace."""
        try:
            return read(_TRACE, self.fields.get("trace", b"{}"), "trace")
        except Unreadable:
            return {}


def _refuse_newer(protocol: float) -> str | None:
    """Says why a record with this protocol number must not be read; None if it may be read."""
    return (
        f"uses protocol {protocol:.0f}, but this version reads only up to {PROTOCOL}" if protocol > PROTOCOL else None
    )
