"""How similar generated pictures are to real ones, and whether a classifier recognises what was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchforge.model.errors import DataError
from patchforge.model.evaluation.against import FeatureJudge
from patchforge.model.evaluation.frechet import Gaussian, frechet_interval, precision_recall
from patchforge.model.evaluation.judge import FEATURES, Judge, unseen
from patchforge.model.evaluation.layout import nearest_of_classes
from patchforge.model.evaluation.measure import Measure, Ranks, measure_top
from patchforge.model.training.data import Pictures

LEAST_NEW = 2 * FEATURES
"""Fewest pictures from which to estimate a covariance of all features."""


@dataclass(frozen=True)
class Split:
    """Real pictures in two parts: the reference for distances, and pictures whose prompts the model gets."""

    reference: Pictures
    real: Pictures


def split_pictures(pictures: Pictures, count: int, seed: int = 0) -> Split:
    """Halve the training pictures at random, and draw `count` from one half, by weight as in training.

    Raises:
        DataError: there are too few pictures.
    """
    trained = pictures.where(pictures.trained())
    random = np.random.default_rng(seed)
    first = np.isin(np.arange(len(trained)), random.permutation(len(trained))[: len(trained) // 2])
    reference, rest = trained.where(first), trained.where(~first)
    if count > (half := min(len(reference), len(rest))):
        raise DataError(f"{count} pictures to compare with, but half of the training pictures are only {half}")
    return Split(reference, rest.rows(draw_rows(rest, count, random)))


def draw_rows(pictures: Pictures, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw rows `(count,)` by weight, none twice, in random order."""
    weights = pictures.weights.astype(float)
    return random.choice(len(pictures), count, replace=False, p=weights / weights.sum())


def measure_quality(
    judge: FeatureJudge, pictures: Pictures, split: Split, made: Tensor, reconstructed: Tensor, seed: int = 0
) -> dict[str, Measure]:
    """Measure Fréchet distance, precision and recall of `made` and `reconstructed`, `(n, height, width, 3)` uint8 each.

    All are compared with the same half of the real pictures. Real pictures from the other half give the lower bound.
    But the judge was trained on both halves, so it sees real pictures as more similar than perfect new ones could be.
    `frechet_distance_new` avoids this: its real pictures are `unseen` by the judge, and its other sets are cut to the
    same size. A judge that was trained on other pictures needs none of it.
    """
    images = {"made": made, "reconstructed": reconstructed, "real": torch.from_numpy(split.real.images)}
    features = {name: judge.features(each) for name, each in images.items()}
    reference = judge.features(split.reference.images)
    gaussian = Gaussian.of(reference, torch.from_numpy(split.reference.weights))
    same = reference[draw_rows(split.reference, len(split.real), np.random.default_rng(seed))]
    measures = {"frechet_distance": Measure.of({name: frechet_interval(gaussian, f) for name, f in features.items()})}
    fresh = pictures.where(unseen(pictures))
    if isinstance(judge, Judge) and (few := min(len(fresh) // 2, len(made))) >= LEAST_NEW:
        new = judge.features(fresh.images[draw_rows(fresh, few, np.random.default_rng(seed))])
        some = {"made": features["made"][:few], "reconstructed": features["reconstructed"][:few], "real": new}
        measures["frechet_distance_new"] = Measure.of({name: frechet_interval(gaussian, f) for name, f in some.items()})
    sides = {name: precision_recall(same, each) for name, each in features.items()}
    for what in ("precision", "recall"):
        measures[what] = Measure.of({name: each[what] for name, each in sides.items()})
    return measures


def check_judge(judge: Judge, pictures: Pictures) -> None:
    """Check that a judge can name the classes and styles of these pictures.

    Raises:
        DataError: it was trained on others.
    """
    others = len(pictures.class_names) > 1 and list(judge.class_names) != pictures.class_names
    if others or (len(judge.styles) > 1 and not set(pictures.styles) <= set(judge.styles)):
        raise DataError(
            "the judge was trained on other classes or styles. Run `patchforge train judge` with these pictures and "
            "name it with --judge, or measure only --part outside"
        )


def measure_classes(
    judge: Judge, pictures: Pictures, split: Split, made: Tensor, reconstructed: Tensor
) -> dict[str, Measure]:
    """Measure how often the judge, and the nearest layout, name the class that was asked for.

    The judge's upper bound is its accuracy on real pictures that it was not trained on.
    """
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
    return measure_top("class", ranks, [(count, 1)]) | measure_top("layout_class", layouts, [(count, 1)])


def measure_styles(
    judge: Judge, pictures: Pictures, split: Split, made: Tensor, reconstructed: Tensor
) -> dict[str, Measure]:
    """Measure how often the judge names the style that was asked for.

    The upper bound is its accuracy on real pictures that it was not trained on.
    """
    fresh = pictures.where(unseen(pictures))

    def judged(images: Tensor, of: Pictures) -> Ranks:
        own = torch.tensor([judge.styles.index(style) for style in of.styles])
        return Ranks.of(-judge.style_scores(judge.features(images)), own, of.concepts)

    ranks = {"made": judged(made, split.real), "reconstructed": judged(reconstructed, split.real)}
    if len(fresh):
        ranks["real"] = judged(torch.from_numpy(fresh.images), fresh)
    return measure_top("style", ranks, [(len(judge.styles), 1)], tops=(1,))
