"""The forward benchmark compares evaluations that give the same result."""

import pytest
import torch

from patchforge.model.experiments.forward_bench import CONTEXT, DENSE, PAPER, ForwardRow, bench_forward
from patchforge.model.networks.config import ClassConfig


@pytest.fixture(scope="module")
def rows() -> dict[str, ForwardRow]:
    config = ClassConfig(
        in_channels=4, input_size=32, depth=2, hidden_size=64, patch_size=2, num_heads=4, num_classes=10
    )
    return {row.case: row for row in bench_forward("small", config, torch.device("cpu"), rounds=1)}


def test_every_way_to_evaluate_says_the_same(rows: dict[str, ForwardRow]) -> None:
    assert len(rows) == 8
    assert max(row.difference for row in rows.values()) < 1e-5


def test_shared_conditioning_saves_a_third_of_a_blocks_products(rows: dict[str, ForwardRow]) -> None:
    width, patches, branches, depth = 64, 256, 2, 2
    modulation = 2 * 6 * width**2 * patches * branches * depth / 1e9  # of adaLN, per patch
    saved = rows[PAPER].gflop - rows[CONTEXT].gflop
    assert saved > 0.9 * modulation
    assert rows[DENSE].gflop == rows[CONTEXT].gflop  # a block of rows serves up to sixteen conditions


def test_work_falls_with_the_share_of_active_patches(rows: dict[str, ForwardRow]) -> None:
    work = [rows[f"{percent}% of the patches"].gflop for percent in (100, 60, 30, 10)]
    assert work == sorted(work, reverse=True)
    assert work[0] == pytest.approx(rows[CONTEXT].gflop)
    assert work[2] < 0.4 * work[0]
