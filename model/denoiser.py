"""Packs the plans of any mix of pictures into one forward pass of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from model.attention import Group, Keeping, Kept, Layout, TextContext
from model.device import serving_autocast, serving_dtype, upload
from model.guidance import Branch, branches, combine
from model.kv_cache import CachePool, Slot
from model.pft import PFT
from model.text_pft import TextPFT
from model.types import Plan, Prediction

Condition = dict[Branch, int] | dict[Branch, TextContext]
"""Per branch a class label, or a refined text; shared by the pictures of one request."""


@dataclass
class Memory:
    """Where the kept keys and values of one picture lie, per branch; drop it, and they are free for others."""

    slots: dict[Branch, Slot] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """One picture's plan with what it is conditioned on and what it remembers."""

    plan: Plan
    condition: Condition
    memory: Memory


@dataclass(frozen=True)
class PackedSequence:
    """One guidance branch of one evaluation: the unit that attends to itself."""

    owner: int
    branch: Branch
    plan: Plan
    condition: int | TextContext
    slot: Slot | None
    patches: Tensor | None
    """``(a,)`` long: the patches this branch evaluates; None: all of them."""
    time_index: Tensor | None
    """``(a,)`` long: which of the plan's times each of them has; None: all have the first."""
    active: int
    """a"""

    @property
    def shape(self) -> tuple[int, bool, int, bool]:
        """Sequences alike in this can share one batched attention call."""
        text = self.condition if isinstance(self.condition, TextContext) else None
        tokens = 0 if text is None else text.keys_values[0].shape[-2]
        return self.active, self.patches is None, tokens, text is not None and text.mask is not None

    @property
    def values(self) -> Tensor:
        """``(a, D)``: the values of the patches to evaluate."""
        return self.plan.latent if self.patches is None else self.plan.latent[self.patches]


class Denoiser:
    """The only caller of the network at sampling time."""

    def __init__(self, network: PFT | TextPFT) -> None:
        self.network = network.eval()
        self.grid = network.grid
        self.device = next(network.parameters()).device
        self.pool = CachePool(network.cache_shape, serving_dtype(self.device), self.device)
        self._every_patch = torch.arange(self.grid.patches, device=self.device)

    @torch.inference_mode()
    def evaluate(self, evaluations: Sequence[Evaluation]) -> list[Prediction]:
        """Evaluate every plan in one pass; predictions come in the order of ``evaluations``, in float32.

        What is kept of an evaluation that fails half-way is as if it had never begun.

        Raises:
            ValueError: a plan evaluates some patches only, but nothing was kept by an earlier one.
        """
        if not evaluations:
            return []
        sequences = sorted(self._sequences(evaluations), key=lambda sequence: sequence.shape)
        values = torch.cat([sequence.values for sequence in sequences])
        with serving_autocast(self.device):
            output = self._forward(values, sequences).float()
        self._commit(sequences)
        outputs: list[dict[Branch, Tensor]] = [{} for _ in evaluations]
        for sequence, part in zip(sequences, output.split([s.active for s in sequences]), strict=True):
            outputs[sequence.owner][sequence.branch] = part
        return [combine(parts, each.plan, self.grid) for parts, each in zip(outputs, evaluations, strict=True)]

    def patches(self, plan: Plan) -> int:
        """Patch evaluations a plan costs, guidance branches included."""
        return sum(active_patches(plan, branch) for branch in branches(plan))

    def _sequences(self, evaluations: Sequence[Evaluation]) -> list[PackedSequence]:
        return [
            self._sequence(owner, each, branch)
            for owner, each in enumerate(evaluations)
            for branch in branches(each.plan)
        ]

    def _sequence(self, owner: int, evaluation: Evaluation, branch: Branch) -> PackedSequence:
        plan = evaluation.plan
        patches, time_index = plan.patches, plan.time_index
        if branch is Branch.NULL and plan.null_index is not None:
            patches = plan.null_index if patches is None else patches[plan.null_index]
            time_index = None if time_index is None else time_index[plan.null_index]
        slot = self._slot(evaluation, branch, partial=patches is not None)
        active = active_patches(plan, branch)
        return PackedSequence(owner, branch, plan, evaluation.condition[branch], slot, patches, time_index, active)

    def _slot(self, evaluation: Evaluation, branch: Branch, partial: bool) -> Slot | None:
        slots = evaluation.memory.slots
        if partial and branch not in slots:
            raise ValueError("a plan of some patches needs keys and values kept by an earlier plan of all")
        if evaluation.plan.keep and branch not in slots:
            slots[branch] = self.pool.slot()
        return slots.get(branch) if evaluation.plan.keep or partial else None

    def _forward(self, values: Tensor, sequences: list[PackedSequence]) -> Tensor:
        layout = self._layout(sequences)
        conditions, rows = self._conditions(sequences)
        times = upload(torch.tensor([time for time, _ in conditions], dtype=torch.float32), self.device)
        if isinstance(self.network, TextPFT):
            return self.network(values, times, rows, layout)
        labels = upload(torch.tensor([label for _, label in conditions]), self.device)
        return self.network(values, times, labels, rows, layout)

    def _layout(self, sequences: list[PackedSequence]) -> Layout:
        groups, start = [], 0
        for shape, run in groupby(sequences, key=lambda sequence: sequence.shape):
            members = list(run)
            texts = [s.condition for s in members if isinstance(s.condition, TextContext)]
            groups.append(
                Group(
                    start=start,
                    sequences=len(members),
                    active=shape[0],
                    kept=None if shape[1] else self._kept(members),
                    context=TextContext.stack(texts) if texts else None,
                )
            )
            start += len(members) * shape[0]
        positions = [self._places(sequence) for sequence in sequences]
        return Layout(tuple(groups), torch.cat(positions), self._keeping(sequences, positions))

    def _places(self, sequence: PackedSequence) -> Tensor:
        return self._every_patch if sequence.patches is None else sequence.patches

    def _keeping(self, sequences: list[PackedSequence], positions: list[Tensor]) -> Keeping | None:
        """Fresh keys and values go over each patch's older generation, which the newer one then becomes."""
        packed, rows, start = [], [], 0
        for sequence, places in zip(sequences, positions, strict=True):
            if sequence.slot is not None:
                packed.append(torch.arange(start, start + sequence.active, device=self.device))
                rows.append(sequence.slot.row_of(places, 1 - sequence.slot.newest[places]))
            start += sequence.active
        return Keeping(self.pool, torch.cat(packed), torch.cat(rows)) if packed else None

    def _kept(self, sequences: list[PackedSequence]) -> Kept:
        recent, earlier, reach = [], [], []
        for sequence in sequences:
            slot, every = sequence.slot, self._every_patch
            if slot is None:
                raise ValueError("a plan of some patches needs keys and values kept by an earlier plan of all")
            generation = slot.newest.clone()
            generation[self._places(sequence)] ^= 1
            newest = slot.row_of(every, generation)
            recent.append(newest)
            drift = sequence.plan.drift
            if drift is not None:
                row = drift[int(sequence.branch is Branch.CONDITIONAL)]
                # Where nothing is extrapolated the earlier row must not be read: there may never have been one.
                earlier.append(torch.where(row == 0, newest, slot.row_of(every, 1 - generation)))
                reach.append(1 + row)
            else:
                earlier.append(newest)
                reach.append(torch.ones_like(newest, dtype=torch.float32))
        if all(sequence.plan.drift is None for sequence in sequences):
            return Kept(torch.cat(recent))
        return Kept(torch.cat(recent), torch.cat(earlier), torch.cat(reach)[:, None].to(self.pool.dtype))

    def _commit(self, sequences: list[PackedSequence]) -> None:
        for sequence in sequences:
            if sequence.slot is not None:
                sequence.slot.newest[self._places(sequence)] ^= 1

    def _conditions(self, sequences: Sequence[PackedSequence]) -> tuple[list[tuple[float, int]], Tensor | None]:
        """The distinct (time, label) pairs, and which one each packed patch has: None if they all share one.

        A text acts through cross-attention, not through the condition, so its label is always 0.
        """
        distinct: dict[tuple[float, int], int] = {}
        ids: list[int] = []  # of each sequence's times, one after the other
        places = []
        for sequence in sequences:
            label = sequence.condition if isinstance(sequence.condition, int) else 0
            first, index = len(ids), sequence.time_index
            ids += [distinct.setdefault((time, label), len(distinct)) for time in sequence.plan.times]
            places.append(torch.full((sequence.active,), first, device=self.device) if index is None else first + index)
        if len(distinct) == 1:
            return list(distinct), None
        return list(distinct), upload(torch.tensor(ids), self.device).index_select(0, torch.cat(places))


def active_patches(plan: Plan, branch: Branch) -> int:
    """How many patches a plan evaluates in a branch."""
    if branch is Branch.NULL and plan.null_index is not None:
        return plan.null_index.shape[0]
    return plan.active
