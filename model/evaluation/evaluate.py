"""All of ``patchforge eval``: a bundle measured against real pictures, every figure beside its bounds."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from model.evaluation.calibration import Calibration, measure_calibration
from model.evaluation.judge import Judge
from model.evaluation.measure import Measure
from model.evaluation.prompts import measure_prompts
from model.evaluation.quality import measure_classes, measure_quality, measure_styles, split_pictures
from model.evaluation.samples import make_pictures, reconstructions, words_for
from model.manifest import ClassNetwork
from model.pipeline import Pipeline
from model.samplers import Sampler
from model.training.data import Pictures

Part = Literal["quality", "prompts", "calibration"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass
class Report:
    """What was found."""

    pictures: int
    """How many were made for distances and classes."""
    held_out: int
    """How many real pictures uncertainty was measured on."""
    measures: dict[str, Measure] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    patch_evaluations: float | None = None
    """Per picture, guidance branches included."""
    saved: float | None = None
    """Share of a dense run's patch evaluations."""
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """For JSON and ``bundle.json``."""
        cost = None if self.patch_evaluations is None else round(self.patch_evaluations, 1)
        return {
            "pictures": self.pictures,
            "held_out_pictures": self.held_out,
            "patch_evaluations": cost,
            "saved": None if self.saved is None else round(self.saved, 4),
            "seconds": round(self.seconds),
            "measures": {name: each.figures() for name, each in self.measures.items()},
            "calibration": {name: each.figures() for name, each in self.calibration.items()},
        }


def evaluate(
    pipeline: Pipeline,
    judge: Judge,
    pictures: Pictures,
    sampler: Sampler[Any],
    count: int = 1000,
    parts: Collection[Part] = PARTS,
    seed: int = 0,
) -> Report:
    """Measure ``parts`` with ``count`` pictures made by ``sampler``.

    Raises:
        DataError: there are too few pictures to compare with, or the judge is one of other classes.
    """
    started = time.monotonic()
    by_class = isinstance(pipeline.manifest.network, ClassNetwork)
    held_out = pictures.where(pictures.held_out())
    report = Report(count, len(held_out))
    if "quality" in parts:
        split = split_pictures(pictures, count, seed)
        made = make_pictures(pipeline, sampler, words_for(pipeline, split.real), range(seed, seed + count))
        again = reconstructions(pipeline, split.real)
        report.patch_evaluations, report.saved = made.patch_evaluations, made.saved
        report.measures |= measure_quality(judge, pictures, split, made.pictures, again, seed)
        if len(pictures.class_names) > 1:
            report.measures |= measure_classes(judge, pictures, split, made.pictures, again)
        if not by_class and len(judge.styles) > 1:
            report.measures |= measure_styles(judge, pictures, split, made.pictures, again)
    if "prompts" in parts and not by_class:
        report.measures |= measure_prompts(pipeline, judge, pictures, sampler, seed)
    if "calibration" in parts:
        report.calibration = measure_calibration(pipeline, held_out, seed)
    report.seconds = time.monotonic() - started
    return report
