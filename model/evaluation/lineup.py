"""Show generated pictures to the outside judge, each beside the real picture of its prompt and others of its style.

Does the judge find the right one? How alike are the two? Is the generated one as sharp? Every figure has an interval,
and so has every difference between two sets of pictures of the same prompts and noise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchforge.model.errors import DataError
from patchforge.model.evaluation.frechet import (
    Gaussian,
    Interval,
    frechet_difference,
    frechet_interval,
    mean_interval,
    neighbourhood_hits,
)
from patchforge.model.evaluation.measure import Measure, group_of, rank_of_own
from patchforge.model.evaluation.outside import OutsideJudge, Sight
from patchforge.model.evaluation.prompts import CANDIDATES
from patchforge.model.evaluation.samples import make_pictures, reconstruct_pictures, words_for
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Sampler
from patchforge.model.storage.manifest import ClassNetwork
from patchforge.model.training.data import Pictures

REFERENCE = 300
"""Most real pictures per style to compare with for Fréchet distance, precision and recall."""
LOWER_IS_BETTER = frozenset({"distance", "own distance"})
OF_SETS = ("distance", "precision", "recall")
"""The figures that need no real picture of the same prompt. Class-conditional models have only these."""
FEATURES = 1280
Half = Literal["report", "tune"]
Kind = Literal["seen", "combinations", "concepts"]
KINDS: tuple[Kind, ...] = ("seen", "combinations", "concepts")


@dataclass(frozen=True)
class Lineup:
    """Prompts with their real pictures, the candidates among which to search these, and the reference set."""

    asked: Pictures
    """The n real pictures whose prompts the model gets."""
    real: Sight
    """What the judge sees in `asked`."""
    crowd: dict[str, Tensor]
    """Style → features `(m, FEATURES)` of more real pictures, which fill the candidates up to `CANDIDATES`."""
    siblings: Tensor
    """`(n,)`: index in `sibling` of a real picture of the same concept in another style; -1 if there is none."""
    sibling: Sight
    reference: Tensor
    """`(r, FEATURES)`: features of real pictures of other concepts. Empty if no distances are needed."""

    @cached_property
    def gaussian(self) -> Gaussian:
        """A Gaussian fitted to the reference."""
        return Gaussian.of(self.reference)

    @cached_property
    def concepts(self) -> Tensor:
        """`(n,)`: equal numbers for equal concepts."""
        return group_of(self.asked.concepts)

    def evidence(self, made: Sight, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Measure each picture, `(n,)` each: found first, among the first five, cosine to the real picture, sharpness.

        `rows` `(n,)` are the prompts of the pictures in `made`. None: all prompts, in order.
        """
        rows = torch.arange(len(self.asked)) if rows is None else rows
        ranks = self._ranks(made, rows)
        real = self.real.rows(rows)
        return {
            "found first": (ranks < 1).float(),
            "top five": (ranks < 5).float(),
            "cosine": F.cosine_similarity(made.features, real.features),
            # Divided by the mean over all pictures, so that the mean of these is the ratio of the sums.
            "sharpness": made.energy / real.energy.mean(),
        }

    def figures(self, made: Sight) -> dict[str, Interval]:
        """Compute all figures for pictures of all prompts."""
        found = {name: mean_interval(each, self.concepts) for name, each in self.evidence(made).items()}
        if len(self.reference):
            found["distance"] = frechet_interval(self.gaussian, made.features)
            hits = neighbourhood_hits(self.reference[: len(made.features)], made.features)
            found |= {name: mean_interval(each) for name, each in hits.items()}
        return found

    def differences(self, made: Sight, other: Sight) -> dict[str, Interval]:
        """Compute the figures of `made` minus those of `other`, paired by prompt and noise."""
        ours, theirs = self.evidence(made), self.evidence(other)
        found = {name: mean_interval(ours[name] - theirs[name], self.concepts) for name in ours}
        if len(self.reference):
            found["distance"] = frechet_difference(self.gaussian, made.features, other.features)
            same = self.reference[: len(made.features)]
            ours, theirs = neighbourhood_hits(same, made.features), neighbourhood_hits(same, other.features)
            found |= {name: mean_interval(ours[name] - theirs[name]) for name in ours}
        return found

    def floor(self) -> dict[str, Interval]:
        """Compute what real pictures of the same concepts in another style reach, and the distance of `asked`."""
        rows = torch.nonzero(self.siblings >= 0).flatten()
        if not len(rows):
            return {}
        made = self.sibling.rows(self.siblings[rows])
        found = {name: mean_interval(each, self.concepts[rows]) for name, each in self.evidence(made, rows).items()}
        del found["sharpness"]  # it belongs to the other style
        if len(self.reference):
            found["distance"] = frechet_interval(self.gaussian, self.real.features)
            hits = neighbourhood_hits(self.reference[: len(self.asked)], self.real.features)
            found |= {name: mean_interval(each) for name, each in hits.items()}
        return found

    def _ranks(self, made: Sight, rows: Tensor) -> Tensor:
        styles = np.array(self.asked.styles)
        ranks = torch.zeros(len(rows), dtype=torch.long)
        unit = F.normalize(made.features, dim=1)
        for style in sorted(set(self.asked.styles)):
            own = torch.from_numpy(np.flatnonzero(styles == style))
            candidates = F.normalize(torch.cat([self.real.features[own], self.crowd[style]]), dim=1)
            here = torch.nonzero(torch.isin(rows, own)).flatten()
            ranks[here] = rank_of_own(-unit[here] @ candidates.T, torch.searchsorted(own, rows[here]))
        return ranks


def worse(differences: dict[str, Interval]) -> list[str]:
    """List the figures that are worse than those of the compared pictures, beyond the interval."""
    return [name for name, each in differences.items() if (each.low > 0 if name in LOWER_IS_BETTER else each.high < 0)]


def make_lineup(
    pictures: Pictures,
    judge: OutsideJudge,
    count: int,
    kind: Kind = "seen",
    half: Half = "report",
    seed: int = 0,
    distances: bool = True,
) -> Lineup:
    """Draw about `count` prompts, equally many of each style, with one picture per concept and style.

    Presets are chosen on one half of the concepts, `tune`, and reported on the other. `kind` selects trained concepts,
    held-out combinations of concept and style, or held-out concepts.

    Raises:
        DataError: there are no such pictures.
    """
    random = np.random.default_rng(seed)
    trained, styles = pictures.trained(), np.array(pictures.styles)
    of_half = np.array([_assign_half(concept) == half for concept in pictures.concepts])
    able = pictures.held_out()
    if kind != "concepts":
        able = trained & of_half if kind == "seen" else pictures.held_out_combinations()
    names = sorted(set(pictures.styles))
    asked: list[int] = []
    crowd: dict[str, Tensor] = {}
    reference: list[int] = []
    for style in names:
        of_style = styles == style
        some = _draw_one_per_concept(pictures, able & of_style, random)[: min(CANDIDATES, -(-count // len(names)))]
        asked += sorted(some)
        shown = {pictures.concepts[row] for row in some}
        rest = _draw_one_per_concept(pictures, trained & of_half & of_style, random)
        filling = [row for row in rest if pictures.concepts[row] not in shown][: CANDIDATES - len(some)]
        crowd[style] = _look_at_rows(judge, pictures, filling).features
        if distances and some:
            elsewhere = random.permutation(np.flatnonzero(trained & ~of_half & of_style))
            reference += [int(row) for row in elsewhere[:REFERENCE]]
    if len(asked) < 2:
        raise DataError(f"there are no {kind} pictures to ask for")
    found = [_find_sibling(pictures, row) for row in asked]
    others = [row for row in found if row is not None]
    places = iter(range(len(others)))
    random.shuffle(reference)
    return Lineup(
        pictures.rows(np.array(asked)),
        _look_at_rows(judge, pictures, asked),
        crowd,
        torch.tensor([-1 if row is None else next(places) for row in found]),
        _look_at_rows(judge, pictures, others),
        _look_at_rows(judge, pictures, reference).features,
    )


def _look_at_rows(judge: OutsideJudge, pictures: Pictures, rows: list[int]) -> Sight:
    if not rows:
        return Sight(torch.empty(0, FEATURES), torch.empty(0))
    return judge.look(pictures.images[rows])


def _draw_one_per_concept(pictures: Pictures, mask: np.ndarray, random: np.random.Generator) -> list[int]:
    rows = np.flatnonzero(mask)
    _, firsts = np.unique(np.array(pictures.concepts)[rows], return_index=True)
    return [int(row) for row in rows[random.permutation(firsts)]]


def _find_sibling(pictures: Pictures, row: int) -> int | None:
    """Find a picture of the same concept in the next style that has one."""
    same = [
        other
        for other, (concept, style) in enumerate(zip(pictures.concepts, pictures.styles, strict=True))
        if concept == pictures.concepts[row] and style != pictures.styles[row]
    ]
    return next((other for other in same if other > row), same[0] if same else None)


def _assign_half(concept: str) -> Half:
    """Assign a half by name, so that it does not depend on other pictures."""
    return "tune" if hashlib.sha256(f"half of {concept}".encode()).digest()[0] < 128 else "report"


def measure_outside(
    pipeline: Pipeline, judge: OutsideJudge, pictures: Pictures, sampler: Sampler[Any], count: int, seed: int = 0
) -> dict[str, Measure]:
    """Measure about `count` pictures for trained prompts, and pictures for held-out combinations and concepts.

    The bound "real" is what real pictures of the same concepts in another style reach.
    """
    pictures = pictures.resized(pipeline.manifest.size[0])
    by_class = isinstance(pipeline.manifest.network, ClassNetwork)
    measures: dict[str, Measure] = {}
    for number, kind in enumerate(KINDS[:1] if by_class else KINDS):
        try:
            lineup = make_lineup(pictures, judge, count, kind, seed=seed, distances=kind == "seen")
        except DataError:  # a user's own table may have no held-out combinations
            continue
        words, first = words_for(pipeline, lineup.asked), seed + 10_000 * number
        made = make_pictures(pipeline, sampler, words, range(first, first + len(words)), f"prompts, {kind}").pictures
        of_made, again = judge.look(made), judge.look(reconstruct_pictures(pipeline, lineup.asked))
        figures, reconstructed, floor = lineup.figures(of_made), lineup.figures(again), lineup.floor()
        for name in OF_SETS if by_class else figures:
            title = f"outside_{name}" if kind == "seen" else f"outside_{kind}_{name}"
            measures[title.replace(" ", "_")] = Measure(figures[name], reconstructed[name], floor.get(name))
    return measures
