"""The paper's claims at our scale: timestep schedules, then samplers, at equal numbers of network evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchforge.model.evaluation.frechet import (
    Gaussian,
    Interval,
    frechet_difference,
    frechet_interval,
    precision_recall,
)
from patchforge.model.evaluation.judge import Judge
from patchforge.model.evaluation.quality import Split, draw_rows, split_pictures
from patchforge.model.evaluation.samples import make_pictures, words_for
from patchforge.model.experiments.claims_training import TRAINED, Setting, bundle_path
from patchforge.model.pipeline import Pipeline
from patchforge.model.training.data import Pictures

BASELINE = "ltg"


@dataclass(frozen=True)
class Case:
    """A trained model and a sampler."""

    key: str
    label: str
    schedule: str
    sampler: str
    steps: int
    options: dict[str, Any]


def cases(evaluations: int) -> list[Case]:
    """List the cases: every schedule with Euler; then, on the LTG model, the paper's samplers and multistep.

    `evaluations` is the number of network evaluations per picture, a multiple of four. Look-ahead uses one less: its
    first step takes one instead of two.
    """
    trained = [Case(key, f"{label}, Euler", key, "euler", evaluations, {}) for key, label in TRAINED.items()]
    dual = {"quantile": 0.4, "inner_steps": 4, "exact": True}
    return [
        *trained,
        Case("dual_loop", "LTG, dual-loop", BASELINE, "dual_loop", evaluations // 4, dual),
        Case("look_ahead", "LTG, look-ahead", BASELINE, "look_ahead", evaluations // 2, {}),
        Case("multistep", "LTG, multistep (ours)", BASELINE, "multistep", evaluations, {}),
    ]


@dataclass(frozen=True)
class Outcome:
    """The result of one case."""

    key: str
    label: str
    evaluations: int
    """Network evaluations per picture."""
    distance: Interval
    difference: Interval | None
    """Distance − distance of LTG with Euler, on the same conditions and noise. None: this is LTG with Euler."""
    precision: Interval
    recall: Interval

    def figures(self) -> dict[str, Any]:
        """The result for JSON."""
        plain = {"key": self.key, "label": self.label, "evaluations": self.evaluations}
        spans = {"frechet_distance": self.distance, "precision": self.precision, "recall": self.recall}
        found: dict[str, Any] = plain | {name: each.rounded() for name, each in spans.items()}
        return found if self.difference is None else found | {"difference": self.difference.rounded()}


def compare(
    table: Pictures,
    judge: Judge,
    folder: Path,
    setting: Setting,
    count: int = 1000,
    evaluations: int = 32,
    seed: int = 0,
) -> Iterator[Outcome]:
    """Measure every case whose model is in `folder`, after the real pictures, which give the lower bound.

    The features of generated pictures are stored in `folder`, so a comparison that was stopped can continue.
    """
    split = split_pictures(setting.pictures(table), count, seed)
    reference = judge.features(split.reference.images)
    gaussian = Gaussian.of(reference, torch.from_numpy(split.reference.weights))
    same = reference[draw_rows(split.reference, count, np.random.default_rng(seed))]
    real = judge.features(split.real.images)
    yield _measure_outcome(Case("real", "real pictures", "", "", 0, {}), gaussian, same, real, None, 0)
    ready = [case for case in cases(evaluations) if (bundle_path(folder, case.schedule) / "bundle.json").exists()]
    baseline = None
    for case in sorted(ready, key=lambda case: case.key != BASELINE):
        features, spent = _load_features(judge, bundle_path(folder, case.schedule), case, split, folder, seed)
        yield _measure_outcome(case, gaussian, same, features, baseline, spent)
        baseline = features if case.key == BASELINE else baseline


def _measure_outcome(
    case: Case, gaussian: Gaussian, real: Tensor, features: Tensor, baseline: Tensor | None, spent: int
) -> Outcome:
    sides = precision_recall(real, features)
    difference = None if baseline is None else frechet_difference(gaussian, features, baseline)
    distance = frechet_interval(gaussian, features)
    return Outcome(case.key, case.label, spent, distance, difference, sides["precision"], sides["recall"])


def _load_features(judge: Judge, bundle: Path, case: Case, split: Split, folder: Path, seed: int) -> tuple[Tensor, int]:
    """Features `(n, d)` of pictures made for `split.real` without guidance, and network evaluations per picture."""
    pipeline = Pipeline.open(bundle)
    sampler = pipeline.sampler(case.sampler, case.steps, 1.0, **case.options)
    steps, made_at = pipeline.manifest.training["steps"], pipeline.manifest.created
    name = f"{case.key}-{case.steps}-{len(split.real)}-{seed}-{steps}-{made_at}-{judge.record['created']}.safetensors"
    kept = folder / "features" / name
    if not kept.exists():
        seeds = range(seed, seed + len(split.real))
        made = make_pictures(pipeline, sampler, words_for(pipeline, split.real), seeds, case.label)
        kept.parent.mkdir(exist_ok=True)
        spent = torch.tensor(round(made.patch_evaluations / pipeline.grid.patches))
        save_file({"features": judge.features(made.pictures), "evaluations": spent}, kept)
    stored = load_file(kept)
    return stored["features"], int(stored["evaluations"])
