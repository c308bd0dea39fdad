"""Cuts a pack of sequences into parts for several threads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from patchforge.model.networks.row_wise import ROW_BLOCK

CUT_ROWS = 32
"""PyTorch's attention computes this many queries at a time. Cuts at multiples of it do not change a bit of the result,
if the sequence's rows are whole blocks of `ROW_BLOCK`."""
FEWEST_VALUES = 24_576
"""Fewest values (rows times the network's width) in a part. In smaller parts, threads mostly wait for the Python
interpreter, which runs one thread at a time."""
RELUCTANCE = 1 / 8
"""Imbalance between parts, as a share of a part, that is accepted to avoid cutting a sequence: the parts of a cut
sequence wait for each other in every layer."""


def fewest_rows(width: int) -> int:
    """Return the fewest rows of a part, in a network of this width."""
    return max(CUT_ROWS, FEWEST_VALUES // width)


def cut(lengths: Sequence[int], parts: int, fewest: int, inside: bool) -> list[list[tuple[int, int, int]]]:
    """Cut consecutive sequences of `lengths` rows into at most `parts` parts of similar size.

    On average, parts have at least `fewest` rows. Sequences are cut only if `inside` is true. Each part is a list of
    (index of the sequence, its first row, the row after its last one).
    """
    total = sum(lengths)
    parts = min(parts, max(1, total // fewest))
    starts = [0, *accumulate(lengths)]
    costs = dict.fromkeys(starts[1:-1], 0.0)
    for start, rows in zip(starts, lengths, strict=False):
        if inside and rows % ROW_BLOCK == 0:
            costs |= dict.fromkeys(range(start + CUT_ROWS, start + rows, CUT_ROWS), RELUCTANCE * total / parts)
    cuts = {0, total}
    for number in range(1, parts if costs else 1):
        ideal = number * total / parts
        cuts.add(min(costs, key=lambda place: abs(place - ideal) + costs[place]))
    made: list[list[tuple[int, int, int]]] = []
    for first, last in pairwise(sorted(cuts)):
        made.append(
            [
                (index, max(first, start) - start, min(last, end) - start)
                for index, (start, end) in enumerate(pairwise(starts))
                if start < last and end > first
            ]
        )
    return made
