"""Guards: under which calls does a recorded graph stand for the forward?

What recording burnt into the graph is checked before each use: the structure and plain values of the arguments, dtype,
device and identity of the tensors, the conditions on their sizes, training or not, autocast, and what else the forward
read: grad mode, strides, plain attributes of the module, its children and its configuration. A guard that fails says
why.
"""

import functools
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree

from lpcompile.capture.looks import PLAIN, Unseen, look_at
from lpcompile.capture.outside import Named


@dataclass(frozen=True)
class TensorFact:
    """What a graph assumes of a tensor argument."""

    shape: tuple[int | str, ...]
    """A name stands for any size of at least 2, the same wherever it stands in the guard."""
    dtype: torch.dtype
    device: torch.device
    alias: int | None = None
    """Index of the earlier leaf that is the same object."""
    stride: tuple[int, ...] | None = None
    """In elements; None: the forward did not read it."""


@dataclass(frozen=True)
class ValueFact:
    """What a graph assumes of a plain value: its type (1 is not True) and itself."""

    kind: type
    value: object


@dataclass(frozen=True)
class SizeFact:
    """What a graph assumes of an argument that is a size computed by the caller: a number, or a name as in a shape."""

    size: int | str


Fact = TensorFact | ValueFact | SizeFact


@dataclass(frozen=True)
class Guard:
    """When a graph holds: `check` returns None, or what differs."""

    in_spec: pytree.TreeSpec
    """Structure of (args, kwargs)."""
    leaves: tuple[Fact, ...]
    names: tuple[str, ...]
    """How a sentence calls each leaf."""
    training: bool | None
    """None: recorded in both modes, and the graph is the same."""
    grad_enabled: bool | None
    """None: the forward neither switched nor read grad mode, so the graph holds in both."""
    autocast: tuple[tuple[str, torch.dtype | None], ...]
    """Per device type the dtype, or None where autocast is off."""
    attributes: tuple[tuple[str, ValueFact], ...] = ()
    """Plain attributes that the forward read, as dotted paths from the module (`scaling`, `attn_dropout.p`,
    `config.use_cache`, `wte.weight.dtype`): a schedule or a user may change them between steps."""
    conditions: tuple[str, ...] = ()
    """On the named sizes, as Python source: `s1 > 8`, `s0*s1 == s2`."""
    looks: tuple[tuple[str, Any], ...] = ()
    """Attributes that are not plain, as dotted paths, and what was seen of them (looks.py): functions, methods, objects
    in containers, the shapes of parameters. Not compared under torch.compile, nor is what follows."""
    outside: tuple[tuple[Named, Any], ...] = ()
    """Globals and the like that the forward's code names (outside.py), and what was seen of them."""
    default_dtype: torch.dtype | None = None
    """None: any."""
    inference_mode: bool | None = None
    """None: the forward did not read it."""
    is_forward_only: bool = False
    """The graph has no carriers of the gradient, and holds only where grad mode is off."""
    unhooked: tuple[str, ...] = ()
    """Children, as paths from the module, that the graph does not call as the forward did, or hands other tensors: it
    holds only while none of them has hooks, nor every module has, which would see what is no more computed."""
    _plan: Any = field(init=False, repr=False, compare=False)
    _rows: Any = field(init=False, repr=False, compare=False)
    _attribute_rows: Any = field(init=False, repr=False, compare=False)
    _look_rows: Any = field(init=False, repr=False, compare=False)
    _outside_rows: Any = field(init=False, repr=False, compare=False)
    _unhooked_rows: Any = field(init=False, repr=False, compare=False)
    _broken_size: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # tuples for the hot path, made here and not on demand: torch.compile traces through a check, not through a lock
        paths = [(path.split("."), fact) for path, fact in self.attributes]
        object.__setattr__(self, "_plan", _plan(self.in_spec))
        object.__setattr__(self, "_rows", tuple(_row(fact) for fact in self.leaves))
        object.__setattr__(
            self, "_attribute_rows", tuple((tuple(steps), name, f.value, f.kind) for (*steps, name), f in paths)
        )
        looks = [(path.split("."), look) for path, look in self.looks]
        object.__setattr__(
            self, "_look_rows", tuple((tuple(steps), name, _atom(look), look) for (*steps, name), look in looks)
        )
        object.__setattr__(self, "_outside_rows", tuple((named, _atom(look), look) for named, look in self.outside))
        object.__setattr__(self, "_unhooked_rows", tuple((path, path.split(".")) for path in self.unhooked))
        sizes = tuple(None if isinstance(fact, ValueFact) else _sizes(fact) for fact in self.leaves)
        object.__setattr__(self, "_broken_size", _compile_sizes(sizes, self.conditions))

    def __reduce__(self) -> tuple[Any, ...]:
        # the compiled rows are no state: made again on loading
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        values["looks"] = tuple((path, _kept(look)) for path, look in self.looks)
        # a closure is made again from its code
        values["outside"] = tuple((named, _kept(look)) for named, look in self.outside if not named.space.is_cell)
        return Guard, tuple(values.values())

    def check(self, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> str | None:
        """None when the graph holds for this call, else one short sentence."""
        matched = self.match(module, args, kwargs)
        return matched if isinstance(matched, str) else None

    def match(
        self, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> list[Tensor | int] | str:
        """The graph's operands, or what differs. About 5 us for eight leaves."""
        if self.training is not None and module.training is not self.training:
            return f"training is {module.training}, recorded {self.training}"
        if self.grad_enabled is not None and torch.is_grad_enabled() is not self.grad_enabled:
            return f"grad mode is {torch.is_grad_enabled()}, recorded {self.grad_enabled}"
        if self.is_forward_only and torch.is_grad_enabled():
            return "grad mode is on, compiled for inference"
        for device_type, dtype in self.autocast:
            if autocast_dtype(device_type) is not dtype:
                return f"autocast on {device_type} is {autocast_dtype(device_type)}, recorded {dtype}"
        if self.default_dtype is not None and torch.get_default_dtype() is not self.default_dtype:
            return f"the default dtype is {torch.get_default_dtype()}, recorded {self.default_dtype}"
        if self.inference_mode is not None and torch.is_inference_mode_enabled() is not self.inference_mode:
            return f"inference mode is {torch.is_inference_mode_enabled()}, recorded {self.inference_mode}"
        if self._attribute_rows and (differing := self.differing_attribute(module)) is not None:
            return differing
        has_looks = (self._look_rows or self._outside_rows) and not torch.compiler.is_compiling()
        if has_looks and (differing := self._differing_look(module)) is not None:
            return differing
        if self._unhooked_rows and (hooked := self._hooked(module)) is not None:
            return hooked
        leaves: list[Any] = []
        if not _collect(self._plan, (tuple(args), kwargs), leaves):
            return "the structure of the arguments differs"
        return self._operands(leaves)

    def differing_attribute(self, module: nn.Module) -> str | None:
        """What differs among the attributes that the forward read, if anything."""
        for steps, name, value, kind in self._attribute_rows:
            owner: Any = module
            for step in steps:
                owner = getattr(owner, step, None)
            now = getattr(owner, name, None)
            if now is not value and (type(now) is not kind or now != value):
                return f"attribute {'.'.join((*steps, name))} is {_describe(now)}, recorded {value!r}"
        return None

    def _differing_look(self, module: nn.Module) -> str | None:
        """What differs among the attributes that are not plain and the names outside, if anything."""
        for steps, name, atom, look in self._look_rows:
            owner: Any = module
            for step in steps:
                owner = getattr(owner, step, None)
            now = getattr(owner, name, None)
            if now is atom or getattr(now, "__func__", _NO_FUNCTION) is atom or (name == "shape" and now == _SHARDED):
                continue
            if not _looks(now, look):
                return f"attribute {'.'.join((*steps, name))} is {_describe(now)}, not what was recorded"
        for named, atom, look in self._outside_rows:
            now = named.value()
            if now is not atom and not _looks(now, look):
                return f"{named} is {_describe(now)}, not what was recorded"
        return None

    def _hooked(self, module: nn.Module) -> str | None:
        """The first child of `unhooked` that has hooks, if any; those of backward count where a gradient flows."""
        if any(_GLOBAL_HOOKS):
            return "every module has hooks, which see their inputs and outputs"
        for path, steps in self._unhooked_rows:
            child: Any = module
            for step in steps:
                child = getattr(child, step)
            is_seen = child._forward_hooks or child._forward_pre_hooks
            if is_seen or (torch.is_grad_enabled() and (child._backward_hooks or child._backward_pre_hooks)):
                return f"{path} has hooks, which see its input and output"
        return None

    def _operands(self, leaves: list[Any]) -> list[Tensor | int] | str:
        operands: list[Any] = []
        sizes: list[Any] = []
        for index, (kind, first, dtype, device, alias, stride) in enumerate(self._rows):
            leaf = leaves[index]
            if kind is ValueFact:
                if leaf is not first and (type(leaf) is not dtype or leaf != first):
                    return f"{self.names[index]} is {_describe(leaf)}, recorded {first!r}"
                continue
            if kind is SizeFact:
                if not isinstance(leaf, (int, torch.SymInt)) or type(leaf) is bool:
                    return f"{self.names[index]} is {_describe(leaf)}, recorded a size"
                sizes.append(leaf)
                operands.append(leaf)
                continue
            if not isinstance(leaf, Tensor):
                return f"{self.names[index]} is {_describe(leaf)}, recorded a tensor"
            shape = leaf.shape
            if dtype is not leaf.dtype:
                return f"{self.names[index]} is {leaf.dtype}, recorded {dtype}"
            if leaf.device != device:
                return f"{self.names[index]} is on {leaf.device}, recorded {device}"
            if len(shape) != len(first):
                return f"{self.names[index]} has shape {tuple(shape)}, recorded {_print_shape(first)}"
            sizes.extend(shape)
            if stride is not None and leaf.stride() != stride:
                return f"{self.names[index]} has strides {leaf.stride()}, recorded {stride}"
            if alias is None:
                operands.append(leaf)
            elif leaf is not leaves[alias]:
                return f"{self.names[index]} is no longer the same tensor as {self.names[alias]}"
        broken = self._broken_size(*sizes)
        if broken is not None:
            index, condition = broken
            if index is None:
                return f"the sizes {tuple(sizes)} do not fit {condition}"
            fact, leaf = self.leaves[index], leaves[index]
            if isinstance(fact, SizeFact):
                return f"{self.names[index]} is {leaf}, recorded {fact.size}"
            return f"{self.names[index]} has shape {tuple(leaf.shape)}, recorded {_print_shape(fact.shape)}"
        if len(operands) > 1 and len({id(operand) for operand in operands if isinstance(operand, Tensor)}) != sum(
            isinstance(operand, Tensor) for operand in operands
        ):
            return "two arguments are the same tensor, recorded as two"
        return operands


def is_plain(value: object) -> bool:
    """A value that can stand in a graph as a constant and in a guard as an equality."""
    return type(value) in PLAIN or isinstance(value, Enum)


def is_container(value: object) -> bool:
    """Containers that arguments are looked for in. A mutable object (a cache) is never taken apart: what the forward
    writes to it would be lost, even if pytree knows its type."""
    return type(value) in (tuple, list, dict) or (isinstance(value, tuple) and hasattr(value, "_fields"))


def plain_copy(value: object) -> object | None:
    """A plain value, or a copy of a container of plain values; None for whatever else (and for None)."""
    if is_plain(value) or isinstance(value, (np.generic, int, float, str)):
        return value
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        items = {key: plain_copy(item) for key, item in value.items()}
        return items if all(copied is not None or value[key] is None for key, copied in items.items()) else None
    if type(value) in (list, tuple, set, frozenset):
        copies = [(item, plain_copy(item)) for item in value]  # type: ignore[attr-defined]
        if all(copied is not None or item is None for item, copied in copies):
            return type(value)(copied for _, copied in copies)  # type: ignore[call-arg]
    return None


def with_article(value: object) -> str:
    """What a sentence calls a value by its type: `an int`, `a DynamicCache`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def flatten_arguments(args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves of (args, kwargs) and their structure; whatever is no plain container is a leaf."""
    return pytree.tree_flatten((tuple(args), dict(kwargs)), is_leaf=lambda value: not is_container(value))


def argument_facts(leaves: Sequence[object]) -> tuple[Fact, ...]:
    """The facts of argument leaves that are tensors, sizes or plain values, as in the example, strides included."""
    seen: dict[int, int] = {}
    facts: list[Fact] = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            alias = seen.setdefault(id(leaf), index)
            stride = tuple(leaf.stride()) if leaf.layout is torch.strided else None
            facts.append(
                TensorFact(tuple(leaf.shape), leaf.dtype, leaf.device, None if alias == index else alias, stride)
            )
        elif isinstance(leaf, torch.SymInt):
            facts.append(SizeFact(int(leaf.node.hint)))
        else:
            facts.append(ValueFact(type(leaf), leaf))
    return tuple(facts)


def autocast_state() -> tuple[tuple[str, torch.dtype | None], ...]:
    """The autocast dtype per device type of this machine."""
    return tuple((device_type, autocast_dtype(device_type)) for device_type in _device_types())


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """None where autocast is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _device_types() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _row(fact: Fact) -> tuple[Any, ...]:
    if isinstance(fact, TensorFact):
        return TensorFact, fact.shape, fact.dtype, fact.device, fact.alias, fact.stride
    if isinstance(fact, SizeFact):
        return SizeFact, None, None, None, None, None
    return ValueFact, fact.value, fact.kind, None, None, None


def _sizes(fact: TensorFact | SizeFact) -> tuple[int | str, ...]:
    return fact.shape if isinstance(fact, TensorFact) else (fact.size,)


@functools.lru_cache(maxsize=1024)
def _compile_sizes(
    sizes: tuple[tuple[int | str, ...] | None, ...], conditions: tuple[str, ...]
) -> Callable[..., tuple[int | None, str] | None]:
    """One function of every size in the arguments, in order: None, or (leaf, condition) of the first that is broken.
    `sizes` are those of each leaf, None where a leaf is no tensor and no size.
    """
    wanted = [(index, size) for index, each in enumerate(sizes) for size in each or ()]
    seen: set[str] = set()
    lines = []
    for number, (index, size) in enumerate(wanted):
        if isinstance(size, int) or size in seen:
            lines.append(f"    if d{number} != {size}: return {index}, ''")
            continue
        seen.add(size)
        lines.append(f"    {size} = d{number}")
        lines.append(f"    if {size} < 2: return {index}, ''")
    lines += [f"    if not ({condition}): return None, {condition!r}" for condition in conditions]
    arguments = ", ".join(f"d{number}" for number in range(len(wanted)))
    namespace: dict[str, Any] = {"math": math}
    exec("\n".join([f"def broken({arguments}):", *lines, "    return None"]), namespace)
    return namespace["broken"]


def _print_shape(shape: Sequence[int | str]) -> str:
    """(s0, 16), as a tuple prints, without quotes."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _plan(spec: pytree.TreeSpec) -> tuple[Any, ...] | None:
    """None for a leaf, else (type, keys or None, number of children, plans of the children)."""
    if spec.is_leaf():
        return None
    keys = tuple(spec.context) if spec.type is dict else None
    kind = spec.context if isinstance(spec.context, type) else spec.type
    children = tuple(_plan(child) for child in spec.children())
    return kind, keys, len(children), children


def _collect(plan: tuple[Any, ...] | None, value: Any, leaves: list[Any]) -> bool:
    """Append the leaves of `value` in the plan's order; False where the structure differs."""
    if plan is None:
        leaves.append(value)
        return not is_container(value)
    kind, keys, count, children = plan
    if type(value) is not kind or len(value) != count:
        return False
    if keys is not None:
        try:
            value = [value[key] for key in keys]
        except KeyError:
            return False
    for child, item in zip(children, value):
        if child is None:
            # inlined leaf: most nodes are leaves, and a call costs as much as the check
            if type(item) in _CONTAINERS or (isinstance(item, tuple) and is_container(item)):
                return False
            leaves.append(item)
        elif not _collect(child, item, leaves):
            return False
    return True


def _atom(look: Any) -> Any:
    """The object that alone has this look, if it says so by itself."""
    if isinstance(look, (FunctionType, BuiltinFunctionType)):
        return look
    if isinstance(look, tuple) and len(look) == 2 and (look[0] == "method" or look[0] in _ATOMS):
        return look[1]
    return _NO_ATOM


def _looks(now: Any, look: Any) -> bool:
    try:
        return bool(look_at(now) == look)
    except Unseen:
        return False


class _Lost:
    """What was seen, and could not be pickled: nothing looks like it."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


def _kept(look: Any) -> Any:
    try:
        pickle.dumps(look)
    except (pickle.PicklingError, AttributeError, TypeError):
        return _Lost()
    return look


def _describe(value: object) -> str:
    return repr(value) if plain_copy(value) is not None or value is None else with_article(value)


_CONTAINERS = frozenset({tuple, list, dict})

_GLOBAL_HOOKS = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)

_ATOMS = frozenset({bool, int, float, str, type(None), torch.dtype})

_NO_ATOM = object()

_NO_FUNCTION = object()

_SHARDED = torch.Size([0])
"""The shape of a parameter that an engine (ZeRO-3) holds elsewhere until it is used."""
