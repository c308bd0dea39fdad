"""Does a text-to-image model draw what the prompt names? Search its picture among those of other prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchforge.model.evaluation.judge import Judge, unseen
from patchforge.model.evaluation.layout import layout_features
from patchforge.model.evaluation.measure import Measure, Ranks, measure_top
from patchforge.model.evaluation.samples import make_pictures, reconstruct_pictures
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Sampler
from patchforge.model.training.data import Pictures
from patchforge.model.training.run import prompt_of

CANDIDATES = 100


def measure_prompts(
    pipeline: Pipeline, judge: Judge, pictures: Pictures, sampler: Sampler[Any], seed: int = 0
) -> dict[str, Measure]:
    """Measure how often a prompt's own picture is found among `CANDIDATES` pictures of the same style.

    - `prompt`: the judge searches among generated pictures, for concepts that the model was trained on. The judge was
      not trained on the real pictures of these prompts.
    - `prompt_held_out`: the same, for concepts that neither model nor judge has seen, mixed with others.
    - `layout`, `layout_held_out`: the layout of the generated picture searches the real one among real pictures.

    The upper bound of the first two is what the judge finds among real pictures of the same prompts. The last two have
    no upper bound.
    """
    collected: dict[str, dict[str, list[Ranks]]] = {}
    sizes: dict[str, list[tuple[int, int]]] = {}
    for number, style in enumerate(sorted(set(pictures.styles))):
        part, new = candidates(pictures, style, seed)
        prompts = [prompt_of(part, row) for row in range(len(part))]
        seeds = range(seed + 1000 * number, seed + 1000 * number + len(part))
        label = f"prompts, {style}" if style else "prompts"
        images = {
            "made": make_pictures(pipeline, sampler, prompts, seeds, label).pictures,
            "reconstructed": reconstruct_pictures(pipeline, part),
            "real": torch.from_numpy(part.images),
        }
        texts = judge.embed(prompts)
        scores = {name: judge.text_scores(judge.features(each), texts) for name, each in images.items()}
        layouts = {name: layout_features(each) for name, each in images.items()}
        for suffix, rows, asked in _questions(new):
            sizes.setdefault(suffix, []).append((len(rows), asked))
            for name, each in scores.items():
                ranks = _ranks(-each[rows][:, rows].T, part, rows, asked)
                collected.setdefault(f"prompt{suffix}", {}).setdefault(name, []).append(ranks)
                if name != "real":
                    ranks = _ranks(torch.cdist(layouts[name][rows], layouts["real"][rows]), part, rows, asked)
                    collected.setdefault(f"layout{suffix}", {}).setdefault(name, []).append(ranks)
    measures: dict[str, Measure] = {}
    for key, by_set in collected.items():
        counts = sizes["_held_out" if key.endswith("_held_out") else ""]
        measures |= measure_top(key, {name: Ranks.join(each) for name, each in by_set.items()}, counts)
    return measures


def candidates(pictures: Pictures, style: str, seed: int = 0) -> tuple[Pictures, np.ndarray]:
    """Choose pictures of one style, one per concept: up to `CANDIDATES` `unseen` ones, and as many held-out ones.

    Returns the pictures, and a boolean mask `(n,)` of the held-out ones.
    """
    random = np.random.default_rng(seed)
    of_style = np.array([each == style for each in pictures.styles])
    held_out = pictures.held_out()
    chosen = np.zeros(len(pictures), bool)
    for kind in (unseen(pictures), held_out):
        rows = np.flatnonzero(kind & of_style)
        _, firsts = np.unique(np.array(pictures.concepts)[rows], return_index=True)
        chosen[rows[random.permutation(firsts)[:CANDIDATES]]] = True
    return pictures.where(chosen), held_out[chosen]


def _questions(new: np.ndarray) -> list[tuple[str, Tensor, int]]:
    """List the questions: (suffix, rows of the candidates, how many of the first candidates are searched for)."""
    old, held_out = torch.from_numpy(np.flatnonzero(~new)), torch.from_numpy(np.flatnonzero(new))
    mixed = torch.cat([held_out, old])[:CANDIDATES]
    questions = [("", old, len(old)), ("_held_out", mixed, min(len(held_out), len(mixed)))]
    return [question for question in questions if question[2] and len(question[1]) > 1]


def _ranks(distances: Tensor, part: Pictures, rows: Tensor, asked: int) -> Ranks:
    return Ranks.of(distances[:asked], torch.arange(asked), [part.concepts[row] for row in rows[:asked]])
