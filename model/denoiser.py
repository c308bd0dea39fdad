"""Packs the plans of any mix of pictures into one forward pass of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from model.attention import Group, Layout, TextContext
from model.device import serving_autocast, serving_dtype
from model.guidance import Branch, branches, combine
from model.pft import PFT
from model.text_pft import TextPFT
from model.types import Plan, Prediction

Condition = dict[Branch, int] | dict[Branch, TextContext]
"""Per branch a class label, or a refined text; shared by the pictures of one request."""


@dataclass
class Memory:
    """Keys and values of one picture, per branch ``(layers, 2, heads, P, d_head)``."""

    caches: dict[Branch, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """One picture's plan with what it is conditioned on and what it remembers."""

    plan: Plan
    condition: Condition
    memory: Memory


@dataclass(frozen=True)
class _Sequence:
    """One guidance branch of one evaluation: the unit that attends to itself."""

    owner: int
    branch: Branch
    plan: Plan
    condition: int | TextContext
    cache: Tensor | None

    @property
    def shape(self) -> tuple[int, bool, int, bool]:
        """Sequences alike in this can share one batched attention call."""
        text = self.condition if isinstance(self.condition, TextContext) else None
        tokens = 0 if text is None else text.keys_values[0].shape[-2]
        return self.plan.active, self.plan.patches is None, tokens, text is not None and text.mask is not None


class Denoiser:
    """The only caller of the network at sampling time."""

    def __init__(self, network: PFT | TextPFT) -> None:
        self.network = network.eval()
        self.grid = network.grid
        self.device = next(network.parameters()).device
        self._every_patch = torch.arange(self.grid.patches, device=self.device)

    @torch.inference_mode()
    def evaluate(self, evaluations: Sequence[Evaluation]) -> list[Prediction]:
        """Evaluate every plan in one pass; predictions come in the order of ``evaluations``, in float32.

        Raises:
            ValueError: a plan evaluates some patches only, but nothing was kept by an earlier one.
        """
        if not evaluations:
            return []
        sequences = sorted(self._sequences(evaluations), key=lambda sequence: sequence.shape)
        values = torch.cat([_planned_latent(sequence.plan) for sequence in sequences])
        with serving_autocast(self.device):
            output = self._forward(values, sequences).float()
        outputs: list[dict[Branch, Tensor]] = [{} for _ in evaluations]
        for sequence, part in zip(sequences, output.split([s.plan.active for s in sequences]), strict=True):
            outputs[sequence.owner][sequence.branch] = part
        return [combine(parts, each.plan, self.grid) for parts, each in zip(outputs, evaluations, strict=True)]

    def patches(self, plan: Plan) -> int:
        """Patch evaluations a plan costs, guidance branches included."""
        return plan.active * len(branches(plan))

    def _sequences(self, evaluations: Sequence[Evaluation]) -> list[_Sequence]:
        return [
            _Sequence(owner, branch, each.plan, each.condition[branch], self._cache(each, branch))
            for owner, each in enumerate(evaluations)
            for branch in branches(each.plan)
        ]

    def _cache(self, evaluation: Evaluation, branch: Branch) -> Tensor | None:
        plan, caches = evaluation.plan, evaluation.memory.caches
        if plan.patches is not None and branch not in caches:
            raise ValueError("a plan of some patches needs keys and values kept by an earlier plan of all")
        if plan.keep and branch not in caches:
            caches[branch] = torch.empty(self.network.cache_shape, dtype=serving_dtype(self.device), device=self.device)
        return caches.get(branch) if plan.keep or plan.patches is not None else None

    def _forward(self, values: Tensor, sequences: list[_Sequence]) -> Tensor:
        layout = self._layout(sequences)
        conditions, rows = self._conditions(sequences)
        times = torch.tensor([time for time, _ in conditions], dtype=torch.float32, device=self.device)
        if isinstance(self.network, TextPFT):
            return self.network(values, times, rows, layout)
        labels = torch.tensor([label for _, label in conditions], device=self.device)
        return self.network(values, times, labels, rows, layout)

    def _layout(self, sequences: list[_Sequence]) -> Layout:
        groups, start = [], 0
        for shape, run in groupby(sequences, key=lambda sequence: sequence.shape):
            members = list(run)
            texts = [s.condition for s in members if isinstance(s.condition, TextContext)]
            some = [s.plan.patches for s in members if s.plan.patches is not None]
            groups.append(
                Group(
                    start=start,
                    sequences=len(members),
                    active=shape[0],
                    patches=torch.stack(some) if some else None,
                    caches=tuple(s.cache for s in members),
                    context=TextContext.stack(texts) if texts else None,
                )
            )
            start += len(members) * shape[0]
        positions = [self._every_patch if s.plan.patches is None else s.plan.patches for s in sequences]
        return Layout(tuple(groups), torch.cat(positions))

    def _conditions(self, sequences: list[_Sequence]) -> tuple[list[tuple[float, int]], Tensor | None]:
        """The distinct (time, label) pairs, and which one each packed patch has: None if they all share one.

        A text acts through cross-attention, not through the condition, so its label is always 0.
        """
        distinct: dict[tuple[float, int], int] = {}
        rows = []
        for sequence in sequences:
            label = sequence.condition if isinstance(sequence.condition, int) else 0
            ids = [distinct.setdefault((time, label), len(distinct)) for time in sequence.plan.times]
            index = sequence.plan.time_index
            if index is None:
                rows.append(torch.full((sequence.plan.active,), ids[0], device=self.device))
            else:
                rows.append(torch.tensor(ids, device=self.device)[index])
        return list(distinct), torch.cat(rows) if len(distinct) > 1 else None


def _planned_latent(plan: Plan) -> Tensor:
    """``(a, D)``: the values of the patches to evaluate."""
    return plan.latent if plan.patches is None else plan.latent[plan.patches]
