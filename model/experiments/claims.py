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

from patchforge.model.evaluation.against import FeatureJudge
from patchforge.model.evaluation.frechet import (
    Gaussian,
    Interval,
    frechet_difference,
    frechet_interval,
    mean_interval,
    neighbourhood_hits,
)
from patchforge.model.evaluation.outside import OutsideJudge, Sight
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
    found: dict[str, Interval]
    """Fréchet distance, precision, recall and sharpness (real = 1) by the outside judge; distance by our own."""
    differences: dict[str, Interval]
    """`found` − that of LTG with Euler, on the same conditions and noise. Empty: there is nothing to compare with."""

    def figures(self) -> dict[str, Any]:
        """The result for JSON."""
        plain = {"key": self.key, "label": self.label, "evaluations": self.evaluations}
        spans = {name: each.rounded() for name, each in self.found.items()}
        return plain | spans | {"differences": {name: each.rounded() for name, each in self.differences.items()}}


@dataclass(frozen=True)
class Judges:
    """The outside judge, which no row can please by training, and our own as a second opinion."""

    outside: OutsideJudge
    own: FeatureJudge
    own_key: str
    """Changes with our judge: what it said earlier is not taken for another judge's word."""

    def look(self, images: np.ndarray | Tensor) -> Seen:
        """See pictures `(n, height, width, 3)` uint8."""
        return Seen(self.outside.look(images), self.own.features(images))


@dataclass(frozen=True)
class Seen:
    """What both judges see in n pictures."""

    sight: Sight
    own: Tensor
    """`(n, d)`: our judge's features."""


@dataclass(frozen=True)
class Bounds:
    """Real pictures to compare with: the whole reference, and as many of it as pictures are made."""

    whole: Gaussian
    """The outside judge's."""
    own: Gaussian
    """Our judge's."""
    same: Tensor
    """`(n, 1280)`: the outside judge's features."""
    energy: Tensor
    """`()`: mean gradient energy of the real pictures."""

    def evidence(self, made: Seen) -> dict[str, Tensor]:
        """Measure each picture, `(n,)` each; recall: each real one."""
        return neighbourhood_hits(self.same, made.sight.features) | {"sharpness": made.sight.energy / self.energy}

    def figures(self, made: Seen) -> dict[str, Interval]:
        """Compute all figures."""
        distances = {
            "distance": frechet_interval(self.whole, made.sight.features),
            "own distance": frechet_interval(self.own, made.own),
        }
        return distances | {name: mean_interval(each) for name, each in self.evidence(made).items()}

    def differences(self, made: Seen, other: Seen) -> dict[str, Interval]:
        """Compute the figures of `made` − those of `other`, paired by condition and noise."""
        distances = {
            "distance": frechet_difference(self.whole, made.sight.features, other.sight.features),
            "own distance": frechet_difference(self.own, made.own, other.own),
        }
        ours, theirs = self.evidence(made), self.evidence(other)
        return distances | {name: mean_interval(ours[name] - theirs[name]) for name in ours}


def compare(
    table: Pictures,
    judges: Judges,
    folder: Path,
    setting: Setting,
    count: int = 1000,
    evaluations: int = 32,
    seed: int = 0,
) -> Iterator[Outcome]:
    """Measure every case whose model is in `folder`, after the real pictures, which give the lower bound.

    What the judges see in generated pictures is stored in `folder`, so a comparison that was stopped can continue.
    """
    split = split_pictures(setting.pictures(table), count, seed)
    reference, real = judges.look(split.reference.images), judges.look(split.real.images)
    weights = torch.from_numpy(split.reference.weights)
    bounds = Bounds(
        Gaussian.of(reference.sight.features, weights),
        Gaussian.of(reference.own, weights),
        reference.sight.features[draw_rows(split.reference, count, np.random.default_rng(seed))],
        real.sight.energy.mean(),
    )
    yield Outcome("real", "real pictures", 0, bounds.figures(real), {})
    ready = [case for case in cases(evaluations) if (bundle_path(folder, case.schedule) / "bundle.json").exists()]
    baseline = None
    for case in sorted(ready, key=lambda case: case.key != BASELINE):
        made, spent = _load_seen(judges, bundle_path(folder, case.schedule), case, split, folder, seed)
        differences: dict[str, Interval] = {} if baseline is None else bounds.differences(made, baseline)
        yield Outcome(case.key, case.label, spent, bounds.figures(made), differences)
        baseline = made if case.key == BASELINE else baseline


def _load_seen(judges: Judges, bundle: Path, case: Case, split: Split, folder: Path, seed: int) -> tuple[Seen, int]:
    """See pictures made for `split.real` without guidance. Also tell the network evaluations per picture."""
    pipeline = Pipeline.open(bundle)
    sampler = pipeline.sampler(case.sampler, case.steps, 1.0, **case.options)
    steps, made_at = pipeline.manifest.training["steps"], pipeline.manifest.created
    name = f"{case.key}-{case.steps}-{len(split.real)}-{seed}-{steps}-{made_at}-{judges.own_key}.safetensors"
    kept = folder / "seen" / name
    if not kept.exists():
        seeds = range(seed, seed + len(split.real))
        made = make_pictures(pipeline, sampler, words_for(pipeline, split.real), seeds, case.label)
        kept.parent.mkdir(exist_ok=True)
        seen, spent = judges.look(made.pictures), round(made.patch_evaluations / pipeline.grid.patches)
        tensors = {"features": seen.sight.features, "energy": seen.sight.energy, "own": seen.own}
        save_file(tensors | {"evaluations": torch.tensor(spent)}, kept)
    stored = load_file(kept)
    return Seen(Sight(stored["features"], stored["energy"]), stored["own"]), int(stored["evaluations"])
