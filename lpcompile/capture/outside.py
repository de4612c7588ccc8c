"""Outside: what a forward can read that is neither an argument nor an attribute of its module.

    def forward(self, x):                  GS of this file, a global, by value
        return scaled(self.a(x)) * GS      scaled, a function, by identity, and what it reads in turn
                                           self.act, a method, by identity, and what it reads in turn

Nothing tells when a global is read, so every global counts that the code names, and the code of the functions that it
names, to a small depth. What can be looked at stands in the guard as a Look; what moves on by being used (a random
generator, an iterator), and what nothing shows to have changed (the environment, a clock), is no matter for a graph.
"""

import functools
import importlib
import logging
import os
import sys
import sysconfig
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from inspect import unwrap
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lpcompile.capture.looks import PLAIN


@dataclass(frozen=True)
class Space:
    """Where a name is looked up: a Python module, a class, the globals of no module, or a cell of a closure."""

    holder: Any = field(compare=False)
    key: int

    @staticmethod
    def of(holder: Any) -> "Space":
        return Space(holder, id(holder))

    def get(self, name: str) -> Any:
        holder = self.holder
        if type(holder) is dict:
            return holder.get(name, MISSING)
        if type(holder) is CellType:
            return holder.cell_contents if _is_filled(holder) else MISSING
        return getattr(holder, name, MISSING)

    def put(self, name: str, value: Any) -> None:
        holder = self.holder
        if type(holder) is dict:
            holder[name] = value
        elif type(holder) is CellType:
            holder.cell_contents = value
        else:
            setattr(holder, name, value)

    @property
    def is_cell(self) -> bool:
        return type(self.holder) is CellType

    @property
    def label(self) -> str:
        return getattr(self.holder, "__name__", "a closure" if self.is_cell else "its file")

    def __reduce__(self) -> Any:
        holder = self.holder
        module = holder.__name__ if isinstance(holder, ModuleType) else getattr(holder, "__module__", None)
        return _find_space, (module, holder.__qualname__ if isinstance(holder, type) else None)


def _find_space(module: str | None, qualname: str | None) -> Space:
    try:
        holder: Any = importlib.import_module(module or "")
        for name in (qualname or "").split(".") if qualname else ():
            holder = getattr(holder, name)
    except (ImportError, AttributeError, ValueError):
        holder = {}  # where nothing is what it was
    return Space.of(holder)


@dataclass(frozen=True)
class Named:
    """A name that code reads, and where."""

    space: Space
    name: str

    def value(self) -> Any:
        return self.space.get(self.name)

    def __str__(self) -> str:
        return f"{self.name} of {self.space.label}"


@dataclass
class Reads:
    """What some functions read outside of their arguments."""

    named: dict[Named, None] = field(default_factory=dict)
    functions: dict[CodeType, None] = field(default_factory=dict)
    refusal: str | None = None
    """What of it no guard can see, completing "the forward of this module ...", if anything."""
    grad_mode: bool = False


class Outside:
    """What the forwards of one recording read outside. Looked up once per class and function."""

    def __init__(self) -> None:
        self._found: dict[Any, Reads] = {}

    def reads(self, function: Callable[..., Any], cls: type) -> Reads:
        """`cls` is the class whose methods the function may call."""
        inner = getattr(function, "__func__", function)
        key = inner, cls
        if key not in self._found:
            self._found[key] = reads = Reads()
            self._follow(inner, cls, reads, MAX_DEPTH)
        return self._found[key]

    def _follow(self, function: Any, cls: type, reads: Reads, depth: int) -> None:
        if isinstance(function, functools.partial):
            function = function.func
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType) or function.__code__ in reads.functions or not _is_users(function):
            return
        code = function.__code__
        reads.functions[code] = None
        names = _names(code)
        scope = sys.modules.get(function.__globals__.get("__name__", ""))
        space = Space.of(scope if scope and vars(scope) is function.__globals__ else function.__globals__)
        for name in names:
            if name in function.__globals__ and not name.startswith("__"):
                self._note(Named(space, name), names, cls, reads, depth)
            self._note_methods(name, cls, reads, depth)
        for name, cell in zip(code.co_freevars, function.__closure__ or ()):
            if name != "__class__" and _is_filled(cell):
                self._note(Named(Space.of(cell), name), names, cls, reads, depth)
        wrapped = unwrap(function)
        if wrapped is not function:
            self._follow(wrapped, cls, reads, depth)

    def _note_methods(self, name: str, cls: type, reads: Reads, depth: int) -> None:
        for base in cls.__mro__ if depth else ():
            found = vars(base).get(name)
            if found is None or base.__module__.startswith("torch.") or base in (nn.Module, object):
                continue
            if isinstance(found, property):
                self._follow(found.fget, cls, reads, depth - 1)
            elif isinstance(found, (FunctionType, classmethod, staticmethod)):
                self._follow(found, cls, reads, depth - 1)
            elif not callable(found) and not hasattr(type(found), "__get__"):
                self._note(Named(Space.of(base), name), frozenset(), cls, reads, depth)

    def _note(self, named: Named, names: frozenset[str], cls: type, reads: Reads, depth: int) -> None:
        value = named.value()
        if value is torch.is_grad_enabled or value is torch._C.is_grad_enabled:
            reads.grad_mode = True
        elif value in _OVERRIDE_QUESTIONS if isinstance(value, BuiltinFunctionType) else False:
            self._refuse(reads, f"asks {named.name}, which is answered otherwise while it is recorded")
        elif isinstance(value, ContextVar):
            self._refuse(reads, f"reads {named}, a context variable, which no guard holds")
        elif value is os.environ or value is os.getenv or (value is os and names & {"environ", "getenv"}):
            self._refuse(reads, "reads the environment, which no guard holds")
        elif isinstance(value, FunctionType):
            if type(named.space.holder) is not CellType:
                reads.named[named] = None
            if depth:
                self._follow(value, cls, reads, depth - 1)
        elif isinstance(value, (ModuleType, type)):
            origin = value.__name__ if isinstance(value, ModuleType) else value.__module__
            if _is_users_module(origin) and not (isinstance(value, type) and issubclass(value, (nn.Module, Enum))):
                inner = vars(value)
                for name in names & inner.keys():
                    if not name.startswith("__") and not isinstance(inner[name], (ModuleType, type, property)):
                        self._note(Named(Space.of(value), name), frozenset(), cls, reads, max(depth - 1, 0))
        elif not isinstance(value, (Tensor, nn.Module, logging.Logger)) and not _is_registry(named, value):
            reads.named[named] = None

    def _refuse(self, reads: Reads, reason: str) -> None:
        reads.refusal = reads.refusal or reason


def _is_registry(named: Named, value: Any) -> bool:
    """A global of transformers that grows with each model made or attention registered, and says nothing of one."""
    module = getattr(named.space.holder, "__name__", "")
    return module.startswith("transformers.") and type(value) not in PLAIN


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """Every global and attribute that the code names, functions inside it included."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _is_users(function: FunctionType) -> bool:
    return not _is_library(function.__code__.co_filename)


def _is_library(file: str) -> bool:
    is_standard = file.startswith(_STANDARD) and "site-packages" not in file
    return is_standard or file.startswith((*_LIBRARIES, "<frozen"))


@functools.lru_cache(maxsize=4096)
def _is_users_module(name: str) -> bool:
    module = sys.modules.get(name)
    path = getattr(module, "__file__", None)
    if module is None or name.partition(".")[0] in ("builtins", "torch", "numpy", "transformers", "lpcompile"):
        return False
    return path is None or not _is_library(path)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


MAX_DEPTH = 3
"""How many calls deep functions are followed by their names."""

MISSING = object()

_OVERRIDE_QUESTIONS = (
    torch.overrides.has_torch_function,
    torch.overrides.has_torch_function_unary,
    torch.overrides.has_torch_function_variadic,
)

_LIBRARIES = tuple(str(Path(file).parent) for file in (torch.__file__, np.__file__, __file__))
"""Folders whose code is not looked into; nor is the standard library's."""

_STANDARD = sysconfig.get_path("stdlib")
