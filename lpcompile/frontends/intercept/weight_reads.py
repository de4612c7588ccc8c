"""Weight reads: does the forward of a module use the matrix of one of its children itself, as in
`F.conv1d(x, self.conv.weight)`? Then the child is never called, and the product is one that the module writes.

Told from names in bytecode, of the forward and of what it calls by name: more may be found than is read, at the price
of a mode that is entered for nothing.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from lpcompile.frontends.install import own_forward

_MOST_FUNCTIONS = 200


def reads_a_matrix_below(module: nn.Module) -> bool:
    """Whether its forward names a parameter of two dimensions or more that a module below it has."""
    cls: Any = type(module)
    forward = inspect.unwrap(own_forward(module) or cls.forward)
    named = _named_by(cls, getattr(forward, "__func__", forward))
    return any(name in named for child in module.children() for name in _matrices(child))


def _matrices(module: nn.Module) -> Iterator[str]:
    for each in module.modules():
        yield from (name for name, p in each._parameters.items() if p is not None and p.dim() >= 2)


@lru_cache(maxsize=1024)
def _named_by(cls: Any, forward: Callable[..., Any]) -> frozenset[str]:
    """Every name in the forward of a class and in what functions, methods and properties of its package it calls."""
    package = cls.__module__.partition(".")[0]
    names, seen, waiting = set[str](), set[CodeType](), list[Any]([forward])
    while waiting and len(seen) < _MOST_FUNCTIONS:
        function = inspect.unwrap(waiting.pop())
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        here = names_in(function.__code__)
        names |= here
        for name in here:
            for found in (inspect.getattr_static(cls, name, None), function.__globals__.get(name)):
                called = getattr(found, "fget", None) or getattr(found, "__func__", found)
                if str(getattr(called, "__module__", "")).partition(".")[0] == package:
                    waiting.append(called)
    return frozenset(names)


def names_in(code: CodeType) -> set[str]:
    """Of attributes, globals and texts in a function and in those inside of it."""
    names = {*code.co_names, *(each for each in code.co_consts if isinstance(each, str))}
    for each in code.co_consts:
        if isinstance(each, CodeType):
            names |= names_in(each)
    return names
