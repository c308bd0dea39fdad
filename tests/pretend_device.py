"""A simulated second device: it refuses what a GPU refuses, and counts how often the host waits for it.

Its tensors say that they are on `meta`, a device that PyTorch always has, but they hold values, computed on the CPU.
So serving code for a GPU runs from end to end, without casts to bf16, and its pictures can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

PRETENDED = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten
COMPOSED = {aten.to, aten.item, aten.is_nonzero}
"""Operations that PyTorch splits into copies and waits. In inference mode they arrive unsplit."""
COPIES = {aten._to_copy.default, aten.copy_.default}
"""Operations that may use tensors of both devices."""
WAITS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
"""The host knows their result, or its shape, only when the device has finished."""
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""A mask among the indices makes a GPU wait, because the true entries must be counted."""


class OnDevice(Tensor):
    """A tensor on the simulated device. `values` holds the same on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Self:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made: Self = Tensor._make_wrapper_subclass(cls, values.shape, device=PRETENDED, **layout)
        return made

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def tolist(self) -> Any:
        """PyTorch's own method does not work for subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with PretendDevice():  # none is active: this runs after the test, when its tensors are freed
            return op(*args, **(kwargs or {}))


class PretendDevice(TorchDispatchMode):
    """Inside this block, `PRETENDED` is a device.

    Raises:
        AssertionError: an operation uses tensors of both devices; or a tensor is created there from a Python list,
            which would make a GPU wait. Use `patchforge.model.device.upload`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """Operations that the host waits for. Copies count too, except non-blocking ones to the device."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if op.overloadpacket in COMPOSED:
            with self:
                return op.decompose(*args, **options)
        tensors = [each for each in tree_flatten((args, options))[0] if isinstance(each, Tensor)]
        placed = [each for each in tensors if isinstance(each, OnDevice)]
        asked = options.get("device")
        if op is aten.copy_.default:
            target = args[0].device
        elif asked is not None:
            target = torch.device(asked)
        else:
            target = PRETENDED if placed else CPU
        self._judge(op, args, options, target, tensors)
        if asked is not None and target == PRETENDED:
            options["device"] = CPU
        made = op(*_values(args), **_values(options))
        if op._schema.is_mutable and placed:
            return args[0] if op._schema.returns else None
        if target != PRETENDED:
            return made
        with torch.inference_mode(False):  # PyTorch makes no views of wrappers that are inference tensors
            return tree_map_only(Tensor, OnDevice, made)

    def _judge(
        self, op: Any, args: Sequence[Any], options: Mapping[str, Any], target: torch.device, tensors: list[Tensor]
    ) -> None:
        """Refuse the operation, or count its wait."""
        if op in COPIES:
            source, free = tensors[-1], options.get("non_blocking") or args[-1] is True
            waits = source.device != target and not (free and target == PRETENDED)
        elif not any(isinstance(each, OnDevice) for each in tensors):
            waits = False
        else:
            # Zero-dimensional tensors count as numbers.
            strangers = [each for each in tensors if not isinstance(each, OnDevice) and each.dim() > 0]
            assert not strangers, f"{op} sees a tensor that is not on the device"
            waits = op in WAITS or (
                op in INDEXES and any(each is not None and each.dtype is torch.bool for each in args[1])
            )
        self.waits[str(op)] += waits


def _values(tree: Any) -> Any:
    return tree_map_only(OnDevice, lambda each: each.values, tree)
