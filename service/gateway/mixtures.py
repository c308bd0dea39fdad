"""Says in the log when workers serve different bundles under one name."""

from __future__ import annotations

import structlog

from patchforge.service.gateway.fleet import Fleet

log = structlog.get_logger(__name__)


class Mixtures:
    """Logs one line when a name begins to stand for several bundles, and one when it no longer does."""

    def __init__(self) -> None:
        self._mixed: set[str] = set()

    def look(self, fleet: Fleet) -> None:
        digests = {card.name: fleet.digests(card.name) for card in fleet.cards}
        mixed = {name for name, found in digests.items() if len(found) > 1}
        for name in sorted(mixed - self._mixed):
            log.warning("workers serve different bundles under one name", model=name, digests=digests[name])
        for name in sorted(self._mixed - mixed):
            log.info("workers serve one bundle under this name again", model=name, digests=digests.get(name, []))
        self._mixed = mixed
