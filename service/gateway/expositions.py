"""Merges several Prometheus expositions (metrics in text format) into one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

log = structlog.get_logger(__name__)


def merge_expositions(texts: Sequence[bytes]) -> bytes:
    """Returns one valid exposition: samples with the same name and labels are summed. A single text stays unchanged.

    Creation times cannot be summed and are left out. Texts that cannot be parsed are left out too, with a log line.
    """
    if len(texts) == 1:
        return texts[0]
    families: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in texts:
        for family in _parse(text):
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            samples = sums.setdefault(family.name, {})
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    key = sample.name, tuple(sorted(sample.labels.items()))
                    samples[key] = samples.get(key, 0.0) + sample.value
    for name, family in families.items():
        for (sample_name, labels), value in sums[name].items():
            family.add_sample(sample_name, dict(labels), value)
    registry = CollectorRegistry()
    registry.register(_Families(family for family in families.values() if family.samples))
    return generate_latest(registry)


def _parse(text: bytes) -> list[Metric]:
    try:
        return list(text_string_to_metric_families(text.decode()))
    except Exception as error:  # the parser raises all kinds of errors, and one worker's text must not hide the others'
        log.warning("skipped metrics that cannot be parsed", reason=type(error).__name__)
        return []


class _Families(Collector):
    """A collector of metrics that are already collected."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
