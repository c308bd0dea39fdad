"""The paper's claims at our scale: schedules of timesteps, then samplers, each at equal network evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.evaluation.claims_training import TRAINED, Setting, bundle_of
from model.evaluation.frechet import (
    Gaussian,
    Interval,
    frechet_difference,
    frechet_interval,
    precision_recall,
)
from model.evaluation.judge import Judge
from model.evaluation.quality import Split, draw, split_pictures
from model.evaluation.samples import make_pictures, words_for
from model.pipeline import Pipeline
from model.training.data import Pictures

BASELINE = "ltg"


@dataclass(frozen=True)
class Case:
    """One trained model, sampled in one way."""

    key: str
    label: str
    schedule: str
    sampler: str
    steps: int
    options: dict[str, Any]


def cases(evaluations: int) -> list[Case]:
    """Every schedule with Euler; then the paper's samplers, and the second-order baseline, on the LTG model.

    ``evaluations`` of the network a picture, a multiple of four; look-ahead's first step takes one instead of two.
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
    """How one case did."""

    key: str
    label: str
    evaluations: int
    """Of the network, a picture."""
    distance: Interval
    difference: Interval | None
    """Distance less that of LTG with Euler on the same conditions and noise; None for that itself."""
    precision: Interval
    recall: Interval

    def figures(self) -> dict[str, Any]:
        """For JSON."""
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
    """Every case whose model `train_claims` has left in ``folder``; the real pictures first, as the floor.

    Features of the pictures made are kept in ``folder``, so a comparison that was stopped goes on.
    """
    split = split_pictures(setting.pictures(table), count, seed)
    reference = judge.features(split.reference.images)
    gaussian = Gaussian.of(reference, torch.from_numpy(split.reference.weights))
    same = reference[draw(split.reference, count, np.random.default_rng(seed))]
    real = judge.features(split.real.images)
    yield _outcome(Case("real", "real pictures", "", "", 0, {}), gaussian, same, real, None, 0)
    ready = [case for case in cases(evaluations) if (bundle_of(folder, case.schedule) / "bundle.json").exists()]
    baseline = None
    for case in sorted(ready, key=lambda case: case.key != BASELINE):
        features, spent = _features(judge, bundle_of(folder, case.schedule), case, split, folder, seed)
        yield _outcome(case, gaussian, same, features, baseline, spent)
        baseline = features if case.key == BASELINE else baseline


def _outcome(
    case: Case, gaussian: Gaussian, real: Tensor, features: Tensor, baseline: Tensor | None, spent: int
) -> Outcome:
    sides = precision_recall(real, features)
    difference = None if baseline is None else frechet_difference(gaussian, features, baseline)
    distance = frechet_interval(gaussian, features)
    return Outcome(case.key, case.label, spent, distance, difference, sides["precision"], sides["recall"])


def _features(judge: Judge, bundle: Path, case: Case, split: Split, folder: Path, seed: int) -> tuple[Tensor, int]:
    """Features ``(n, d)`` of pictures made for ``split.real``, unguided, and network evaluations a picture."""
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
