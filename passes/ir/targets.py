"""Targets: functions by name and names by function, `torch.nn.functional.gelu`, `torch.Tensor.view`, `operator.add`.

A closed table: what torch lets a tensor go through (passes/ir/operators.py), a few builtins, and the functions of
runtime/ops. A text names one of them or is refused: nothing is imported that is not there already, nothing is
called, no attribute is walked to.
"""

import builtins
import importlib
import math
import operator
import pkgutil
import types
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

import runtime.ops
from passes.ir.operators import is_computation, is_function_of_tensors


@lru_cache(maxsize=4096)
def name_of(target: Any) -> str | None:
    """The name that leads back to the function; None if there is none (a user's function, a lambda)."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{target}"
    return _names().get((target, getattr(target, "__name__", "")))


@lru_cache(maxsize=4096)
def find_target(name: str) -> Callable[..., Any]:
    """The function of that name. Raises LookupError with a hint where there is none, or where it is an op that does
    more than compute.
    """
    if name.startswith("torch.ops."):
        if not is_computation(op := find_op(name)):
            raise LookupError("an op of aten or lp that computes tensors of tensors, and does nothing else")
        return op
    table = _table()
    if name not in table:
        close = get_close_matches(name, table, n=1, cutoff=0.8)
        raise LookupError(close[0] if close else f"a function of {', '.join(NAMESPACES)}, torch.ops or runtime.ops")
    return table[name]


def is_target(name: str) -> bool:
    """Whether a text may name it."""
    try:
        find_target(name)
    except LookupError:
        return False
    return True


def find_op(name: str) -> Callable[..., Any]:
    """`torch.ops.NAMESPACE.OP` or `torch.ops.NAMESPACE.OP.OVERLOAD`, of what is registered."""
    parts = name.split(".")[2:]
    found: Any = torch.ops
    if len(parts) in (2, 3) and all(part.isidentifier() and not part.startswith("__") for part in parts):
        for part in parts:
            found = getattr(found, part, None)
        if isinstance(found, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return found
    raise LookupError("an op that is registered, as torch.ops.aten.mm or torch.ops.aten.mm.default")


@lru_cache(maxsize=1)
def _table() -> dict[str, Callable[..., Any]]:
    """Every function that a text may name, by its name; of several names the first is the one that is printed."""
    table: dict[str, Callable[..., Any]] = {}
    for space, (owner, names) in _spaces().items():
        is_filtered = space in _FILTERED
        kept = [name for name in names if not is_filtered or is_function_of_tensors(space, name)]
        table |= {f"{space}.{name}": each for name, each in _functions(owner, kept)}
    for info in pkgutil.iter_modules(runtime.ops.__path__, "runtime.ops."):
        module = importlib.import_module(info.name)
        own = (name for name, each in vars(module).items() if getattr(each, "__module__", "") == info.name)
        table |= {f"{info.name}.{name}": each for name, each in _functions(module, own) if name[0] != "_"}
    return table


@lru_cache(maxsize=1)
def _names() -> dict[tuple[Callable[..., Any], str], str]:
    """The table the other way round, by function and by what it calls itself: torch.mm == torch.dsmm. F.linear is
    torch._C._nn.linear too, and DeepSpeed's ZeRO-3 puts another function in the place of the first.
    """
    linear = torch._C._nn.linear
    names: dict[tuple[Callable[..., Any], str], str] = {(linear, linear.__name__): "torch._C._nn.linear"}
    for name, function in _table().items():
        names.setdefault((function, function.__name__), name)
    return names


def _functions(owner: Any, names: Iterable[str]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What of `names` is a function of `owner`: no class, no module, no plain value."""
    for name in names:
        if isinstance(each := getattr(owner, name, None), _FUNCTIONS):
            yield name, each


def _spaces() -> dict[str, tuple[Any, list[str]]]:
    """Of each namespace, the names that are in the table. Of torch only what takes or makes tensors: torch.load, say,
    is none of them.
    """
    overridable = {owner: {*map(id, each)} for owner, each in torch.overrides.get_overridable_functions().items()}
    spaces = {
        "torch": (torch, _names_in(torch._C._VariableFunctions)),
        "torch.Tensor": (torch.Tensor, [name for name in dir(torch.Tensor) if name not in _NO_METHODS]),
        "torch.nn.functional": (F, list(_MORE_FUNCTIONALS)),
        "torch._C._nn": (torch._C._nn, _names_in(torch._C._nn)),
        "torch._C": (torch._C, ["_set_grad_enabled"]),
        "torch.linalg": (torch.linalg, []),
        "torch.fft": (torch.fft, []),
        "torch.special": (torch.special, []),
        "torch.sparse": (torch.sparse, ["mm", "addmm"]),
        "operator": (operator, [name for name in operator.__all__ if name not in _NO_OPERATORS]),
        "math": (math, _names_in(math)),
        "builtins": (builtins, list(_BUILTINS)),
    }
    assert tuple(spaces) == NAMESPACES
    for owner, names in spaces.values():
        known = overridable.get(owner, set()) if isinstance(owner, types.ModuleType) else set()
        names += [name for name, each in vars(owner).items() if id(each) in known]
    return spaces


def _names_in(owner: Any) -> list[str]:
    return [name for name in dir(owner) if not name.startswith("__")]


NAMESPACES = (
    "torch",
    "torch.Tensor",
    "torch.nn.functional",
    "torch._C._nn",
    "torch._C",
    "torch.linalg",
    "torch.fft",
    "torch.special",
    "torch.sparse",
    "operator",
    "math",
    "builtins",
)
"""Where a function is looked for, in this order."""

_FILTERED = ("torch", "torch.Tensor", "torch._C._nn", "torch.linalg", "torch.fft", "torch.special")
"""Where torch lists functions that are no computation too: torch.from_file, torch.Tensor.share_memory_."""

_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)

_NO_METHODS = {
    *dir(object),
    "__deepcopy__",
    "__reduce_ex__",
    "__setstate__",
    "__torch_dispatch__",
    "__torch_function__",
}
_NO_METHODS -= {"__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__ne__"}
"""What every object has, and how a tensor is copied and pickled, is no computation."""

_NO_OPERATORS = ("attrgetter", "call", "itemgetter", "methodcaller")
"""They call what they are given, or make what calls."""

_MORE_FUNCTIONALS = ("grouped_mm", "hardsigmoid", "hardswish", "relu_", "sigmoid", "scaled_mm", "tanh")
"""What torch.overrides does not list."""

_BUILTINS = ("abs", "divmod", "getattr", "len", "max", "min", "pow", "round", "sum")
