"""Looks: what is compared of a Python value that a graph was recorded with, at every call of it.

look_at(3.0)                (float, 3.0)
look_at(torch.tanh)         torch.tanh
look_at({"o": C(a=1)})      (dict, (("o", (C, (("a", 1),))),))    types left out here
"""

import collections
import functools
import itertools
import logging
import random
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Unseen(Exception):
    """No comparison says whether this is what it was; completes "the forward of this module reads ..."."""


def look_at(value: Any) -> Any:
    """Something that compares equal as long as the value does the same: types, plain values, functions themselves.
    Of tensors and modules the type, since operations and calls of them are in the graph."""
    return _look(value, MAX_DEPTH, [MAX_ITEMS])


def _look(value: Any, depth: int, left: list[int]) -> Any:
    kind = type(value)
    if kind in PLAIN or isinstance(value, (Enum, np.generic, int, float, complex, str, bytes)):
        return kind, value
    if isinstance(value, (FunctionType, BuiltinFunctionType, type, ModuleType)):
        return value
    if isinstance(value, MethodType):
        return "method", value.__func__
    if isinstance(value, (Tensor, nn.Module)):
        return "tensor" if isinstance(value, Tensor) else "module"  # a compiled module has another class
    if depth == 0:
        return _name(kind)
    if moves(value):
        raise Unseen(f"{kind.__name__}, which moves on with each use")
    if isinstance(value, np.ndarray):
        if value.nbytes > MAX_BYTES or value.dtype.hasobject:
            raise Unseen("a numpy array too large to compare at every call")
        return kind, value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, functools.partial):
        return kind, *(_look(part, depth - 1, left) for part in (value.func, value.args, value.keywords))
    if isinstance(value, (dict, list, tuple, set, frozenset, collections.deque)):
        left[0] -= len(value)
        if left[0] < 0:
            raise Unseen("too large to compare at every call")
        if isinstance(value, dict):
            return kind, tuple((_look(key, 1, left), _look(item, depth - 1, left)) for key, item in value.items())
        if isinstance(value, (set, frozenset)):
            return kind, frozenset(item for item in value if type(item) in PLAIN), len(value)
        return kind, tuple(_look(item, depth - 1, left) for item in value)
    if is_object(value):
        left[0] -= len(vars(value))
        if left[0] < 0:
            raise Unseen("too large to compare at every call")
        return kind, tuple((name, _look(item, depth - 1, left)) for name, item in vars(value).items())
    return _name(kind)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def moves(value: Any) -> bool:
    """Whether a value is used up, or moved on, by its use: a random generator, an iterator."""
    return isinstance(value, _GENERATORS) or (hasattr(type(value), "__next__") and not isinstance(value, nn.Module))


def is_object(value: Any) -> bool:
    """A plain object, whose attributes are all there is to it: a configuration, a context."""
    kind = type(value)
    if isinstance(value, (nn.Module, Tensor, type, ModuleType, logging.Logger, logging.Handler, ContextVar)):
        return False
    return not kind.__module__.startswith(("torch.", "_thread", "threading")) and hasattr(value, "__dict__")


def holders(value: Any) -> list[Any]:
    """The containers, plain objects and generators that can be reached from a value, itself included: what a use of it
    can change."""
    return list(itertools.islice(_holders(value, MAX_DEPTH), MAX_HOLDERS))


def _holders(value: Any, depth: int) -> Iterator[Any]:
    if type(value) in PLAIN or isinstance(value, (Tensor, nn.Module, type, FunctionType, np.ndarray)):
        return
    if moves(value) or isinstance(value, torch.Generator):
        yield value
        return
    if isinstance(value, (dict, list, set, collections.deque)):
        yield value
        items: Collection[Any] = value.values() if isinstance(value, dict) else value
    elif isinstance(value, tuple):
        items = value
    elif is_object(value) and not callable(value):
        yield value
        items = vars(value).values()
    else:
        return
    if depth and len(items) <= MAX_ITEMS:
        for item in list(items):
            yield from _holders(item, depth - 1)


PLAIN = frozenset(
    {
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type(...),
        slice,
        range,
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        torch.Size,
    }
)
"""Types of values that can stand in a graph as constants and in a guard as an equality."""

MAX_DEPTH = 4

MAX_ITEMS = 1000
"""In all, that are compared of one value."""

MAX_HOLDERS = 200
"""Of one value, that are watched for changes."""

MAX_BYTES = 1 << 16

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
