"""Measure a bundle against real pictures, as `patchforge eval` does. Every figure comes with its bounds."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from patchforge.model.evaluation.against import FeatureJudge, measure_against
from patchforge.model.evaluation.calibration import Calibration, measure_calibration
from patchforge.model.evaluation.judge import Judge
from patchforge.model.evaluation.lineup import measure_outside
from patchforge.model.evaluation.measure import Measure
from patchforge.model.evaluation.outside import OutsideJudge
from patchforge.model.evaluation.prompts import measure_prompts
from patchforge.model.evaluation.quality import (
    check_judge,
    measure_classes,
    measure_quality,
    measure_styles,
    split_pictures,
)
from patchforge.model.evaluation.samples import make_pictures, reconstruct_pictures, words_for
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Sampler
from patchforge.model.storage.manifest import ClassNetwork
from patchforge.model.training.data import Pictures

Part = Literal["outside", "quality", "prompts", "calibration"]
PARTS: tuple[Part, ...] = get_args(Part)
OUTSIDE = 560
"""Prompts that the outside judge sees, at most: 80 in each of seven styles."""


@dataclass
class Report:
    """All results."""

    pictures: int
    """How many pictures were made to measure distances and classes."""
    held_out: int
    """How many real pictures calibration was measured on."""
    measures: dict[str, Measure] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    patch_evaluations: float | None = None
    """Per picture, in all guidance branches."""
    saved: float | None = None
    """Patch evaluations saved, as a share of a dense run's."""
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """The results for JSON and for `bundle.json`."""
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
    features: FeatureJudge | None = None,
) -> Report:
    """Measure `parts` of a model on `count` pictures made with `sampler`.

    With `features`, these measure the quality, and the judge's classes and styles are left out: it may know others.

    Raises:
        DataError: there are too few real pictures, or the judge was trained on other classes or styles.
    """
    started = time.monotonic()
    by_class = isinstance(pipeline.manifest.network, ClassNetwork)
    if "quality" in parts and features is None:
        check_judge(judge, pictures)  # now, not after drawing for minutes
    pictures = pictures.resized(pipeline.manifest.size[0])
    held_out = pictures.where(pictures.held_out())
    report = Report(count, len(held_out))
    if "outside" in parts:
        report.measures |= measure_outside(pipeline, OutsideJudge(), pictures, sampler, min(count, OUTSIDE), seed)
    if "quality" in parts:
        split = split_pictures(pictures, count, seed)
        made = make_pictures(pipeline, sampler, words_for(pipeline, split.real), range(seed, seed + count))
        again = reconstruct_pictures(pipeline, split.real)
        report.patch_evaluations, report.saved = made.patch_evaluations, made.saved
        report.measures |= measure_quality(features or judge, pictures, split, made.pictures, again, seed)
        if features is None and len(pictures.class_names) > 1:
            report.measures |= measure_classes(judge, pictures, split, made.pictures, again)
        if features is None and not by_class and len(judge.styles) > 1:
            report.measures |= measure_styles(judge, pictures, split, made.pictures, again)
    if "prompts" in parts and not by_class:
        report.measures |= measure_prompts(pipeline, judge, pictures, sampler, seed)
    if "calibration" in parts:
        report.calibration = measure_calibration(pipeline, held_out, seed)
    report.seconds = time.monotonic() - started
    return report


def evaluate_against(
    pipeline: Pipeline,
    features: FeatureJudge,
    reference: Path,
    sampler: Sampler[Any],
    words: Sequence[str],
    seed: int = 0,
    npz: Path | None = None,
) -> Report:
    """Measure the quality of one picture for each of `words` against the pictures of an `.npz`.

    With `npz`, the pictures are written there.

    Raises:
        DataError: the reference cannot be used.
    """
    started = time.monotonic()
    found = measure_against(pipeline, features, reference, sampler, words, seed, npz)
    seconds = time.monotonic() - started
    return Report(len(words), 0, found.measures, {}, found.patch_evaluations, found.saved, seconds)
