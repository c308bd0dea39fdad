"""Read the pickle inside a torch checkpoint as plain data. Nothing that it names is imported or called.

Python's unpickler always creates objects of the classes it is given, even when restricted. This reader is our own: it
knows only the few opcodes that torch writes and a fixed list of names. It returns dicts, lists, records and references
to tensors.
"""

from __future__ import annotations

import pickletools
import warnings
from dataclasses import dataclass, field
from math import prod

import torch

from patchforge.model.errors import BundleError
from patchforge.model.storage.weights import Shape, printable

STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
}
CALLS = {
    "collections Counter",
    "collections OrderedDict",
    "collections defaultdict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
DICTS = {
    "lightning.fabric.utilities.data AttributeDict",
    "lightning_fabric.utilities.data AttributeDict",
    "pytorch_lightning.utilities.parsing AttributeDict",
}
"""Kinds of dict in which a training run may keep its settings."""
RECORDS = {
    "omegaconf.base ContainerMetadata",
    "omegaconf.base Metadata",
    "omegaconf.dictconfig DictConfig",
    "omegaconf.listconfig ListConfig",
    *(f"omegaconf.nodes {kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
}
MARKS = {"typing Any", *(f"__builtin__ {kind}" for kind in ("bool", "dict", "float", "list", "long", "unicode"))}
"""Types that OmegaConf stores with its values, as pickle protocol 2 names them."""
NAMES = STORAGES.keys() | CALLS | DICTS | RECORDS | MARKS
VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MAX_INTEGER = 2**63
MAX_DIMENSIONS = 8


@dataclass(frozen=True, eq=False)
class Name:
    """A global that the pickle mentions, as the text `module name`. It is never looked up."""

    text: str


@dataclass(eq=False)
class Record:
    """An object of an allowed class: its class name, and the attributes that the pickle sets."""

    kind: str
    attributes: dict[object, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StorageRef:
    """A `data/KEY` entry of the archive. The pickle claims that it holds `count` values."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor's place in its storage; offset and stride count values. It was checked to lie inside."""

    storage: StorageRef
    offset: int
    shape: Shape
    stride: Shape


def read_pickle(data: bytes, source: str) -> object:
    """Read the object in `data`, made of dicts, lists, tuples, scalars, `Record`, `Name` and `TensorRef`.

    Objects may form cycles and share parts, so a caller that walks them must limit the walk.

    Raises:
        BundleError: the pickle is damaged or holds anything else; the message names the global or the opcode.
    """
    machine = _Machine(source)
    position = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # invalid escapes in strings, which torch never writes
            for opcode, argument, at in pickletools.genops(data):
                position = at or 0
                if opcode.name == "STOP":
                    return machine.result()
                machine.run(opcode.name, argument)
    except (ValueError, LookupError, TypeError, Warning) as error:
        raise BundleError(f"{source}: damaged pickle near byte {position}: {printable(error)}") from error
    raise BundleError(f"{source}: damaged pickle: its end is missing")


class _Machine:
    """State of the reader: the stack, the marks in it, and the memo."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[object, object] = {}

    def run(self, opcode: str, argument: object) -> None:
        """Carry out one opcode. An empty stack or an unknown memo raises LookupError."""
        if opcode in VALUES:
            self._push_value(argument)
        elif opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode])
        elif opcode in TUPLES:
            self.stack.append(tuple(self._pop(TUPLES[opcode])))
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode == "PROTO":
            if argument != 2:
                raise self._refusal(f"pickle protocol {argument}; torch.save writes protocol 2")
        else:
            self._run_structure(opcode, argument)

    def result(self) -> object:
        """The pickled object: the only one left on the stack."""
        (value,) = self.stack
        return value

    def _run_structure(self, opcode: str, argument: object) -> None:
        match opcode:
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                self.stack.append(tuple(self._pop_to_mark()))
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "APPEND":
                self._append(self._pop(1))
            case "APPENDS":
                self._append(self._pop_to_mark())
            case "SETITEM":
                self._set_items(self._pop(2))
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "GLOBAL":
                self._push_name(str(argument))
            case "BINPERSID":
                self.stack.append(self._make_storage_ref(*self._pop(1)))
            case "NEWOBJ":
                self.stack.append(self._make_object(*self._pop(2)))
            case "REDUCE":
                self.stack.append(self._apply_call(*self._pop(2)))
            case "BUILD":
                self._set_attributes(*self._pop(1))
            case _:
                raise self._refusal(f"the pickle opcode {opcode}, which torch.save does not write for plain weights")

    def _pop(self, count: int) -> list[object]:
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise LookupError("the stack is empty")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _pop_to_mark(self) -> list[object]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _push_value(self, value: object) -> None:
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise self._refusal("an integer of more than 64 bits")
        self.stack.append(value)

    def _push_name(self, name: str) -> None:
        if name not in NAMES:
            shown = printable(name.replace(" ", "."))
            raise self._refusal(f"the global {shown}; allowed are plain values, tensors and OmegaConf settings")
        self.stack.append(Name(name))

    def _append(self, values: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError("items added to something that is not a list")
        target.extend(values)

    def _set_items(self, values: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError("items added to something that is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self._refusal(f"a dict key of type {type(key).__name__}; allowed are text and integers")
            target[key] = value

    def _set_attributes(self, state: object) -> None:
        target = self.stack[-1]
        if not isinstance(state, dict):
            raise self._refusal("an object whose state is not a dict")
        if isinstance(target, Record):
            target.attributes = state
        elif not isinstance(target, dict):  # torch sets `_metadata` on a state dict; we ignore it
            raise self._refusal(f"attributes set on {_describe(target)}")

    def _make_storage_ref(self, reference: object) -> StorageRef:
        match reference:
            case ("storage", Name(text), str(key), str(), int(count)) if text in STORAGES and count >= 0:
                return StorageRef(key, STORAGES[text], count)
        raise self._refusal("a reference to something that is not a tensor storage")

    def _make_object(self, kind: object, arguments: object) -> Record | dict[object, object]:
        if isinstance(kind, Name) and arguments == ():
            if kind.text in RECORDS:
                return Record(kind.text)
            if kind.text in DICTS:
                return {}
        raise self._refusal(f"making an object of {_describe(kind)}")

    def _apply_call(self, function: object, arguments: object) -> object:
        match function, arguments:
            case Name("collections OrderedDict"), ():
                return {}
            case Name("collections defaultdict"), (Name(),):
                return {}
            case Name("collections Counter"), (dict() as counts,):  # of a learning-rate scheduler
                return counts
            case Name("torch._utils _rebuild_tensor_v2"), (StorageRef() as storage, offset, shape, stride, *_):
                return self._make_tensor_ref(storage, offset, shape, stride)
            case Name("torch._utils _rebuild_parameter"), (TensorRef() as tensor, *_):
                return tensor
        raise self._refusal(f"a call of {_describe(function)} with these arguments")

    def _make_tensor_ref(self, storage: StorageRef, offset: object, shape: object, stride: object) -> TensorRef:
        sizes, steps = _check_sizes(shape), _check_sizes(stride)
        if type(offset) is not int or offset < 0 or len(sizes) != len(steps) or len(sizes) > MAX_DIMENSIONS:
            raise self._refusal("a tensor with an impossible shape")
        last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        # The second test refuses strides that repeat values: a small file must not become a huge tensor.
        if prod(sizes) and (last >= storage.count or prod(sizes) > storage.count):
            raise self._refusal(f"a tensor of {prod(sizes):,} values, which does not fit its {storage.count:,}")
        return TensorRef(storage, offset, sizes, steps)

    def _refusal(self, what: str) -> BundleError:
        return BundleError(f"{self.source}: refused: it contains {what}")


def _check_sizes(value: object) -> Shape:
    """Return the value, which must be a tuple of integers ≥ 0."""
    if not isinstance(value, tuple) or not all(type(size) is int and size >= 0 for size in value):
        raise ValueError("a shape that is not a tuple of numbers")
    return value


def _describe(value: object) -> str:
    return value.text.replace(" ", ".") if isinstance(value, Name) else type(value).__name__
