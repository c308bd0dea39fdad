"""How like real pictures a model's are, and whether a classifier takes them for what was asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.errors import DataError
from model.evaluation.frechet import Gaussian, frechet_interval, precision_recall
from model.evaluation.judge import FEATURES, Judge, unseen
from model.evaluation.layout import nearest_of_classes
from model.evaluation.measure import Measure, Ranks, found
from model.training.data import Pictures

LEAST_NEW = 2 * FEATURES
"""So many pictures that a covariance of all features can be told."""


@dataclass(frozen=True)
class Split:
    """Real pictures in two parts: what distances are measured to, and as many as are made, with their prompts."""

    reference: Pictures
    real: Pictures


def split_pictures(pictures: Pictures, count: int, seed: int = 0) -> Split:
    """Halve the pictures models are trained on; from one half draw ``count`` by weight, as training does.

    Raises:
        DataError: there are too few.
    """
    trained = pictures.where(~pictures.held_out())
    random = np.random.default_rng(seed)
    first = np.isin(np.arange(len(trained)), random.permutation(len(trained))[: len(trained) // 2])
    reference, rest = trained.where(first), trained.where(~first)
    if count > len(rest):
        raise DataError(f"{count} pictures to compare with, but half of those trained on are only {len(rest)}")
    return Split(reference, rest.rows(draw(rest, count, random)))


def draw(pictures: Pictures, count: int, random: np.random.Generator) -> np.ndarray:
    """Rows ``(count,)`` by weight, none twice, in random order."""
    weights = pictures.weights.astype(float)
    return random.choice(len(pictures), count, replace=False, p=weights / weights.sum())


def measure_quality(
    judge: Judge, pictures: Pictures, split: Split, made: Tensor, reconstructed: Tensor, seed: int = 0
) -> dict[str, Measure]:
    """Fréchet distance, precision and recall of ``made`` and ``reconstructed``, ``(n, height, width, 3)`` uint8 each.

    All against the same half of the real pictures; the floor is that of real pictures from the other half. But the
    judge was trained on both, which makes real pictures look more alike than new ones, however good, can be:
    ``frechet_distance_new`` therefore has, as its real pictures, those `unseen` by the judge, and of the others only
    equally many.
    """
    images = {"made": made, "reconstructed": reconstructed, "real": torch.from_numpy(split.real.images)}
    features = {name: judge.features(each) for name, each in images.items()}
    reference = judge.features(split.reference.images)
    gaussian = Gaussian.of(reference, torch.from_numpy(split.reference.weights))
    same = reference[draw(split.reference, len(split.real), np.random.default_rng(seed))]
    measures = {"frechet_distance": Measure.of({name: frechet_interval(gaussian, f) for name, f in features.items()})}
    fresh = pictures.where(unseen(pictures))
    if (few := min(len(fresh) // 2, len(made))) >= LEAST_NEW:
        new = judge.features(fresh.images[draw(fresh, few, np.random.default_rng(seed))])
        some = {"made": features["made"][:few], "reconstructed": features["reconstructed"][:few], "real": new}
        measures["frechet_distance_new"] = Measure.of({name: frechet_interval(gaussian, f) for name, f in some.items()})
    sides = {name: precision_recall(same, each) for name, each in features.items()}
    for what in ("precision", "recall"):
        measures[what] = Measure.of({name: each[what] for name, each in sides.items()})
    return measures


def measure_classes(
    judge: Judge, pictures: Pictures, split: Split, made: Tensor, reconstructed: Tensor
) -> dict[str, Measure]:
    """Does the judge, and does the nearest layout, name the class that was asked for?

    The judge's ceiling is its accuracy on real pictures that it was not trained on.

    Raises:
        DataError: the judge knows other classes.
    """
    if list(judge.class_names) != pictures.class_names:
        raise DataError("the judge was trained on other classes; train one on these pictures: patchforge train judge")
    fresh, count = pictures.where(unseen(pictures)), len(pictures.class_names)

    def judged(images: Tensor, of: Pictures) -> Ranks:
        scores = judge.class_scores(judge.features(images))
        return Ranks.of(-scores, torch.from_numpy(of.classes).long(), of.concepts)

    def nearest(images: Tensor) -> Ranks:
        reference, classes = torch.from_numpy(split.reference.images), torch.from_numpy(split.reference.classes).long()
        distances = nearest_of_classes(images, reference, classes, count)
        return Ranks.of(distances, torch.from_numpy(split.real.classes).long(), split.real.concepts)

    ranks = {"made": judged(made, split.real), "reconstructed": judged(reconstructed, split.real)}
    if len(fresh):
        ranks["real"] = judged(torch.from_numpy(fresh.images), fresh)
    layouts = {"made": nearest(made), "reconstructed": nearest(reconstructed)}
    layouts["real"] = nearest(torch.from_numpy(split.real.images))
    return found("class", ranks, count) | found("layout_class", layouts, count)


def measure_styles(
    judge: Judge, pictures: Pictures, split: Split, made: Tensor, reconstructed: Tensor
) -> dict[str, Measure]:
    """Does the judge name the style that was asked for? Its ceiling is that on real pictures new to it."""
    fresh = pictures.where(unseen(pictures))

    def judged(images: Tensor, of: Pictures) -> Ranks:
        own = torch.tensor([judge.styles.index(style) for style in of.styles])
        return Ranks.of(-judge.style_scores(judge.features(images)), own, of.concepts)

    ranks = {"made": judged(made, split.real), "reconstructed": judged(reconstructed, split.real)}
    if len(fresh):
        ranks["real"] = judged(torch.from_numpy(fresh.images), fresh)
    return found("style", ranks, len(judge.styles), tops=(1,))
