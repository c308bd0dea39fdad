"""Pack the plans of any mix of pictures into one forward pass of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby
from threading import Barrier

import torch
from torch import Tensor

from patchforge.model import parallel
from patchforge.model.device import is_compiled, serving_autocast, serving_dtype, upload
from patchforge.model.guidance import Branch, branches, combine
from patchforge.model.networks.attention import Exchange, Group, Keeping, Kept, Layout, TextContext
from patchforge.model.networks.kv_cache import CachePool, Slot
from patchforge.model.networks.layers import patch_centres
from patchforge.model.networks.pft import PFT
from patchforge.model.networks.row_wise import convert_products
from patchforge.model.networks.text_pft import TextPFT
from patchforge.model.openmp import free_cores
from patchforge.model.pieces import cut, fewest_rows
from patchforge.model.types import Grid, Plan, Prediction

Condition = dict[Branch, int] | dict[Branch, TextContext]
"""Per branch, a class label or a refined text. The pictures of one request share it."""


@dataclass
class Memory:
    """The cache slots of one picture, per branch. When it is dropped, other pictures can use the slots."""

    slots: dict[Branch, Slot] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """One picture's plan, with its condition and its cache slots."""

    plan: Plan
    condition: Condition
    memory: Memory
    grid: Grid | None = None
    """None: the network's own."""


@dataclass(frozen=True)
class PackedSequence:
    """One guidance branch of one evaluation. Its patches attend to each other and to no other sequence."""

    owner: int
    branch: Branch
    plan: Plan
    grid: Grid
    condition: int | TextContext
    slot: Slot | None
    patches: Tensor | None
    """`(a,)` long: the patches that this branch evaluates. None: all."""
    time_index: Tensor | None
    """`(a,)` long: the index of each patch's time in the plan's `times`. None: all have the first."""
    active: int
    """How many patches this branch evaluates, a."""

    @property
    def shape(self) -> tuple[int, bool, int, int, bool]:
        """Sequences with equal shapes can share one batched attention call."""
        text = self.condition if isinstance(self.condition, TextContext) else None
        tokens = 0 if text is None else text.keys_values[0].shape[-2]
        masked = text is not None and text.mask is not None
        return self.active, self.patches is None, self.grid.patches, tokens, masked

    @property
    def values(self) -> Tensor:
        """The values of the patches to evaluate, `(a, D)`."""
        return self.plan.latent if self.patches is None else self.plan.latent[self.patches]


@dataclass(frozen=True)
class Piece:
    """The part of a sequence that one thread computes: all of it, unless the sequence is cut."""

    sequence: PackedSequence
    rows: slice
    """Rows within the sequence's a patches."""
    start: int
    """Row of the pack where the sequence begins."""

    @property
    def active(self) -> int:
        """Number of patches."""
        return self.rows.stop - self.rows.start

    @property
    def is_cut(self) -> bool:
        """Whether other parts have the rest of the sequence."""
        return self.active < self.sequence.active


class Denoiser:
    """Evaluates plans. Nothing else calls the network during sampling."""

    def __init__(self, network: PFT | TextPFT, precision: str | None = None) -> None:
        """`precision`: see `serving_dtype`."""
        self.network = network.eval()
        self.grid = network.grid
        self.device = next(network.parameters()).device
        self.dtype = serving_dtype(self.device, precision)
        """Of matrix products and of cached keys and values."""
        convert_products(network, self.dtype)
        self.pool = CachePool(network.cache_shape, self.dtype, self.device)
        self._kind = object()
        self._every_patch = torch.arange(self.grid.patches, device=self.device)
        self._centres: dict[Grid, Tensor] = {}

    @torch.inference_mode()
    def evaluate(self, evaluations: Sequence[Evaluation]) -> list[Prediction]:
        """Evaluate every plan in one pass. Predictions are float32, in the order of `evaluations`.

        If the pass fails half-way, the cache is as before.

        Raises:
            ValueError: a plan evaluates only some patches, but no earlier plan cached the others; or the network cannot
                work on a picture's grid.
        """
        if not evaluations:
            return []
        sequences = sorted(self._list_sequences(evaluations), key=lambda sequence: sequence.shape)
        output = self._compute_parts(sequences)
        self._commit_writes(sequences)
        outputs: list[dict[Branch, Tensor]] = [{} for _ in evaluations]
        for sequence, part in zip(sequences, output.split([s.active for s in sequences]), strict=True):
            outputs[sequence.owner][sequence.branch] = part
        return [combine(parts, each.plan, self.grid) for parts, each in zip(outputs, evaluations, strict=True)]

    def patches(self, plan: Plan) -> int:
        """Count the patch evaluations that a plan costs, in all guidance branches."""
        return sum(active_patches(plan, branch) for branch in branches(plan))

    def _list_sequences(self, evaluations: Sequence[Evaluation]) -> list[PackedSequence]:
        return [
            self._make_sequence(owner, each, branch)
            for owner, each in enumerate(evaluations)
            for branch in branches(each.plan)
        ]

    def _make_sequence(self, owner: int, evaluation: Evaluation, branch: Branch) -> PackedSequence:
        plan, grid = evaluation.plan, self._check_grid(evaluation.grid or self.grid)
        patches, time_index = plan.patches, plan.time_index
        if branch is Branch.NULL and plan.null_index is not None:
            patches = plan.null_index if patches is None else patches[plan.null_index]
            time_index = None if time_index is None else time_index[plan.null_index]
        slot = self._find_slot(evaluation, branch, grid, partial=patches is not None)
        active, condition = active_patches(plan, branch), evaluation.condition[branch]
        return PackedSequence(owner, branch, plan, grid, condition, slot, patches, time_index, active)

    def _check_grid(self, grid: Grid) -> Grid:
        own = self.grid
        if grid != own and (
            not isinstance(self.network, TextPFT)
            or (grid.size, grid.channels) != (own.size, own.channels)
            or grid.patches > own.patches
        ):
            raise ValueError(f"this network cannot work on {grid}")
        return grid

    def _find_slot(self, evaluation: Evaluation, branch: Branch, grid: Grid, partial: bool) -> Slot | None:
        slots = evaluation.memory.slots
        if partial and branch not in slots:
            raise ValueError("a plan for some patches needs an earlier plan that cached all patches")
        if evaluation.plan.keep and branch not in slots:
            slots[branch] = self.pool.slot(grid.patches)
        return slots.get(branch) if evaluation.plan.keep or partial else None

    def _compute_parts(self, sequences: list[PackedSequence]) -> Tensor:
        """Compute the network's output `(n, out)` for the whole pack, each part in another thread."""
        crew = parallel.crew(self.device)
        most = 1 if is_compiled(self.network) else crew.parts
        lengths = [sequence.active for sequence in sequences]
        starts = [0, *accumulate(lengths)]
        # Parts of a cut sequence wait for each other in every layer. If another process has a core, all parts wait for
        # that one, so sequences are cut only if enough cores are free.
        inside = most > 1 and free_cores() >= most
        parts = [
            [Piece(sequences[index], slice(first, last), starts[index]) for index, first, last in part]
            for part in cut(lengths, most, fewest_rows(self.pool.width), inside)
        ]
        if not any(piece.is_cut for part in parts for piece in part):
            # Packs with only some patches have so many different sizes that no two are of one kind.
            whole = all(sequence.patches is None for sequence in sequences)
            kind = (self._kind, *(sequence.shape for sequence in sequences)) if whole else None
            outputs = crew.run([partial(self._forward, part) for part in parts], kind=kind)
        else:
            room = torch.empty((2, 2, starts[-1], self.pool.width), dtype=self.pool.dtype, device=self.device)
            meeting = Barrier(len(parts))
            ends = [Exchange(room, meeting, part[0].start + part[0].rows.start) for part in parts]
            calls = [partial(self._forward, part, end) for part, end in zip(parts, ends, strict=True)]
            outputs = crew.run(calls, meeting.abort)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @torch.inference_mode()
    def _forward(self, pieces: list[Piece], exchange: Exchange | None = None) -> Tensor:
        """Compute one part's output `(n, out)`, in float32. Runs in any thread."""
        with serving_autocast(self.device, self.dtype):
            return self._apply(pieces, exchange).float()

    def _apply(self, pieces: list[Piece], exchange: Exchange | None) -> Tensor:
        values = torch.cat([piece.sequence.values[piece.rows] for piece in pieces])
        layout = replace(self._lay_out(pieces), exchange=exchange)
        conditions, rows = self._index_conditions(pieces)
        times = upload(torch.tensor([time for time, _ in conditions], dtype=torch.float32), self.device)
        if isinstance(self.network, TextPFT):
            return self.network(values, times, rows, layout)
        labels = upload(torch.tensor([label for _, label in conditions]), self.device)
        return self.network(values, times, labels, rows, layout)

    def _lay_out(self, pieces: list[Piece]) -> Layout:
        groups, start = [], 0
        for (shape, _), run in groupby(pieces, key=lambda each: (each.sequence.shape, each.is_cut and each.start)):
            members = list(run)
            [first, *_] = members
            sequences = [piece.sequence for piece in members]
            texts = [s.condition for s in sequences if isinstance(s.condition, TextContext)]
            groups.append(
                Group(
                    start=start,
                    sequences=len(members),
                    active=first.active,
                    kept=None if shape[1] else self._find_kept(sequences),
                    context=TextContext.stack(texts) if texts else None,
                    shared=slice(first.start, first.start + first.sequence.active) if first.is_cut else None,
                )
            )
            start += len(members) * first.active
        positions = [self._positions_of(piece.sequence)[piece.rows] for piece in pieces]
        keeping = self._plan_writes(pieces, positions)
        grids = list(dict.fromkeys(piece.sequence.grid for piece in pieces))
        if len(grids) > 1:
            starts = dict(zip(grids, accumulate((grid.patches for grid in grids), initial=0), strict=False))
            positions = [places + starts[piece.sequence.grid] for piece, places in zip(pieces, positions, strict=True)]
        centres = tuple(map(self._centres_of, grids))
        return Layout(tuple(groups), torch.cat(positions), keeping, centres=centres)

    def _positions_of(self, sequence: PackedSequence) -> Tensor:
        return self._every_patch[: sequence.grid.patches] if sequence.patches is None else sequence.patches

    def _centres_of(self, grid: Grid) -> Tensor:
        if grid not in self._centres:
            self._centres[grid] = upload(patch_centres(grid), self.device)
        return self._centres[grid]

    def _plan_writes(self, pieces: list[Piece], positions: list[Tensor]) -> Keeping | None:
        """Say where the cache writes. Fresh keys and values overwrite each patch's older generation."""
        packed, rows, start = [], [], 0
        for piece, places in zip(pieces, positions, strict=True):
            slot = piece.sequence.slot
            if slot is not None:
                packed.append(torch.arange(start, start + piece.active, device=self.device))
                rows.append(slot.row_of(places, 1 - slot.newest[places]))
            start += piece.active
        return Keeping(self.pool, torch.cat(packed), torch.cat(rows)) if packed else None

    def _find_kept(self, sequences: list[PackedSequence]) -> Kept:
        recent, earlier, reach = [], [], []
        for sequence in sequences:
            slot, every = sequence.slot, self._every_patch[: sequence.grid.patches]
            if slot is None:
                raise ValueError("a plan for some patches needs an earlier plan that cached all patches")
            generation = slot.newest.clone()
            generation[self._positions_of(sequence)] ^= 1
            newest = slot.row_of(every, generation)
            recent.append(newest)
            drift = sequence.plan.drift
            if drift is not None:
                row = drift[int(sequence.branch is Branch.CONDITIONAL)]
                # Without extrapolation the earlier row must not be read: it may never have been written.
                earlier.append(torch.where(row == 0, newest, slot.row_of(every, 1 - generation)))
                reach.append(1 + row)
            else:
                earlier.append(newest)
                reach.append(torch.ones_like(newest, dtype=torch.float32))
        if all(sequence.plan.drift is None for sequence in sequences):
            return Kept(torch.stack(recent))
        return Kept(torch.stack(recent), torch.stack(earlier), torch.cat(reach)[:, None].to(self.pool.dtype))

    def _commit_writes(self, sequences: list[PackedSequence]) -> None:
        for sequence in sequences:
            if sequence.slot is not None:
                sequence.slot.newest[self._positions_of(sequence)] ^= 1

    def _index_conditions(self, pieces: list[Piece]) -> tuple[list[tuple[float, int]], Tensor | None]:
        """Find the distinct (time, label) pairs, and each packed patch's pair; None if all patches share one pair.

        A text acts through cross-attention and not through the condition, so its label is always 0.
        """
        distinct: dict[tuple[float, int], int] = {}
        ids: list[int] = []  # one per time of each sequence, in order
        places = []
        for piece in pieces:
            sequence = piece.sequence
            label = sequence.condition if isinstance(sequence.condition, int) else 0
            first, index = len(ids), sequence.time_index
            ids += [distinct.setdefault((time, label), len(distinct)) for time in sequence.plan.times]
            places.append(
                torch.full((piece.active,), first, device=self.device) if index is None else first + index[piece.rows]
            )
        if len(distinct) == 1:
            return list(distinct), None
        return list(distinct), upload(torch.tensor(ids), self.device).index_select(0, torch.cat(places))


def active_patches(plan: Plan, branch: Branch) -> int:
    """Count the patches that a plan evaluates in a branch."""
    if branch is Branch.NULL and plan.null_index is not None:
        return plan.null_index.shape[0]
    return plan.active
