"""The outside judge tells sharp from blurred and right from wrong, on prompts whose halves never meet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchforge.model.errors import DataError
from patchforge.model.evaluation.evaluate import evaluate
from patchforge.model.evaluation.frechet import Gaussian, Interval, frechet_distance
from patchforge.model.evaluation.lineup import Lineup, make_lineup, measure_outside, worse
from patchforge.model.evaluation.outside import OutsideJudge, gradient_energy
from patchforge.model.experiments.budget_curve import measure_budgets
from patchforge.model.pipeline import Pipeline
from patchforge.model.training.data import Pictures
from tests.model.shapes import shapes


@pytest.fixture(scope="module")
def table() -> Pictures:
    return shapes()


@pytest.fixture(scope="module")
def judge() -> OutsideJudge:
    torch.set_num_threads(1)
    return OutsideJudge()


@pytest.fixture(scope="module")
def lineup(table: Pictures, judge: OutsideJudge) -> Lineup:
    return make_lineup(table, judge, 40)


def blurred(images: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False).round().byte().permute(0, 2, 3, 1)


def test_real_pictures_find_themselves_and_are_as_sharp(lineup: Lineup) -> None:
    found = lineup.figures(lineup.real)
    assert found["sharpness"].value == pytest.approx(1)
    assert found["cosine"].value == pytest.approx(1)
    # Shapes that differ in a name only look the same, and a tie is no find.
    assert found["top five"].value > 0.9
    assert set(found) == {"found first", "top five", "cosine", "sharpness", "distance", "precision", "recall"}


def test_blur_is_seen(lineup: Lineup, judge: OutsideJudge) -> None:
    made = judge.look(blurred(lineup.asked.images))
    assert lineup.figures(made)["sharpness"].value < 0.7
    assert {"sharpness", "cosine"} <= set(worse(lineup.differences(made, lineup.real)))
    assert worse(lineup.differences(lineup.real, lineup.real)) == []


def test_pictures_of_other_prompts_are_not_found(lineup: Lineup) -> None:
    order = torch.arange(len(lineup.asked)).roll(1)
    figures, right = lineup.figures(lineup.real.rows(order)), lineup.figures(lineup.real)
    assert figures["found first"].value < right["found first"].value / 3
    assert figures["distance"].value == pytest.approx(right["distance"].value, rel=1e-6), "the set is the same"


def test_a_lower_distance_is_better() -> None:
    nearer, farther = Interval(-3, -5, -1), Interval(3, 1, 5)
    assert worse({"distance": nearer, "cosine": farther}) == []
    assert worse({"distance": farther, "cosine": nearer}) == ["distance", "cosine"]


def test_the_halves_share_no_concept_and_hold_nothing_held_out(table: Pictures, judge: OutsideJudge) -> None:
    one, other = (set(make_lineup(table, judge, 40, half=half).asked.concepts) for half in ("report", "tune"))
    assert one
    assert other
    assert not one & other
    held_out = {table.concepts[row] for row in np.flatnonzero(table.held_out())}
    assert not held_out & (one | other)
    new = make_lineup(table, judge, 40, kind="concepts", distances=False)
    assert set(new.asked.concepts) <= held_out
    assert "distance" not in new.figures(new.real)


def test_siblings_show_the_same_concept_in_another_style(table: Pictures, judge: OutsideJudge, lineup: Lineup) -> None:
    of_images = {each.tobytes(): row for row, each in enumerate(table.images)}
    floor = lineup.floor()
    assert "sharpness" not in floor
    assert 0 < floor["cosine"].value < 1
    chosen = [row for row in range(len(lineup.asked)) if lineup.siblings[row] >= 0]
    assert chosen
    looks = {row: judge.look(table.images[row : row + 1]).features[0] for row in of_images.values()}
    for row in chosen[:5]:
        same = [
            other
            for other in looks
            if table.concepts[other] == lineup.asked.concepts[row] and table.styles[other] != lineup.asked.styles[row]
        ]
        seen = lineup.sibling.features[lineup.siblings[row]]
        assert any(torch.allclose(seen, looks[other], atol=1e-3) for other in same) or not same


def test_nothing_to_ask_for_is_refused(table: Pictures, judge: OutsideJudge) -> None:
    alone = table.where(table.held_out())
    with pytest.raises(DataError):
        make_lineup(alone, judge, 40, kind="combinations")


def test_energy_is_that_of_differences() -> None:
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[..., 2:] = 1.0  # one edge of height 1 between columns 1 and 2: a third of the differences across
    assert gradient_energy(pixels).item() == pytest.approx(1 / 3)


def test_few_vectors_of_many_numbers_have_the_same_distance() -> None:
    random = torch.Generator().manual_seed(0)
    real, few = torch.randn(60, 20, generator=random), torch.randn(9, 20, generator=random) + 1
    full = frechet_distance(Gaussian.of(real), Gaussian.of(few))
    assert frechet_distance(Gaussian.of(real), few) == pytest.approx(full, rel=1e-6)


@pytest.mark.parametrize("name", ["tiny-class", "tiny-text"])
def test_a_bundle_is_shown_to_the_judge(
    name: str, pipelines: dict[str, Pipeline], table: Pictures, judge: OutsideJudge
) -> None:
    pipeline = pipelines[name]
    if name == "tiny-class":
        table = Pictures(
            **vars(table) | {"class_names": list(pipeline.manifest.class_names), "classes": table.classes % 2}
        )
    measures = measure_outside(pipeline, judge, table, pipeline.sampler("euler", steps=1, guidance=1.0), 12)
    if name == "tiny-class":
        assert set(measures) == {"outside_distance", "outside_precision", "outside_recall"}
        return
    assert measures["outside_found_first"].real is not None
    assert measures["outside_cosine"].made.high < measures["outside_cosine"].real.low  # type: ignore[union-attr]
    assert "outside_concepts_found_first" in measures
    report = evaluate(pipeline, None, table, pipeline.sampler("euler", steps=1, guidance=1.0), 12, ("outside",))  # type: ignore[arg-type]
    assert report.measures == measures


def test_a_table_of_one_style_has_no_floor(table: Pictures, judge: OutsideJudge) -> None:
    flat = table.where(np.array(table.styles) == "flat")
    lineup = make_lineup(flat, judge, 12, distances=False)
    assert len(lineup.asked) == 12
    assert lineup.floor() == {}
    assert lineup.figures(lineup.real)["cosine"].value == pytest.approx(1)


@pytest.mark.parametrize("name", ["tiny-class", "tiny-text"])
def test_the_curve_has_a_point_for_each_budget_and_pictures_keep_it(
    name: str, pipelines: dict[str, Pipeline], table: Pictures, judge: OutsideJudge
) -> None:
    pipeline = pipelines[name]
    if name == "tiny-class":
        names = list(pipeline.manifest.class_names)
        table = Pictures(**vars(table) | {"class_names": names, "classes": table.classes % 2})
    whole, most, least = measure_budgets(pipeline, judge, table, (0.8, 0.3), 12)
    assert (whole.share, whole.psnr, most.share) == (1.0, 60.0, 0.8)
    assert whole.spent > most.spent > least.spent >= pipeline.grid.patches
    assert most.spent <= 0.8 * whole.spent + 1
    assert whole.psnr >= most.psnr >= least.psnr
    assert ("cosine" in whole.figures) == (name == "tiny-text")
    assert {"sharpness", "distance"} <= set(least.recorded()["differences"])
    assert all(each.value == 0 for each in whole.differences.values())
