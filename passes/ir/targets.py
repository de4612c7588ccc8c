"""Targets: functions by name and names by function, `torch.nn.functional.gelu`, `torch.Tensor.view`, `operator.add`.

A target made by calling one named thing on another, as a class of ours on an autograd.Function, is `outer(inner)`.
Naming is sure: a name is given only if it leads back to the same object. To read a name is to import its module, so a
graph file is to be trusted like a Python file.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=4096)
def name_of(target: Any) -> str | None:
    """The name that leads back to the function; None if there is none (a lambda, a local function)."""
    if target in _FIXED:
        return _FIXED[target]
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{target}"
    name = getattr(target, "__name__", "")
    for namespace in NAMESPACES:
        if getattr(_find(namespace), name, None) is target:
            return f"{namespace}.{name}"
    if dataclasses.is_dataclass(target) and not isinstance(target, type):
        fields = [getattr(target, field.name) for field in dataclasses.fields(target)]
        inner = name_of(fields[0]) if len(fields) == 1 else None
        path = f"{type(target).__module__}.{type(target).__qualname__}({inner})"
    else:
        path = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', '')}"
    try:
        return path if find_target(path) == target else None
    except LookupError:
        return None


@lru_cache(maxsize=4096)
def find_target(name: str) -> Any:
    """The function of that name. Raises LookupError with a hint where there is none."""
    outer, bracket, inner = name.partition("(")
    if bracket and inner.endswith(")"):
        return _find(outer)(find_target(inner[:-1]))
    return _find(name)


def _find(path: str) -> Any:
    """The object at a dotted path: the longest module that imports, then attributes."""
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise LookupError("a dotted name, as torch.nn.functional.gelu")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError as error:
            if error.name is None or not ".".join(parts).startswith(error.name):
                raise LookupError(f"to install {error.name}, which this name needs") from error
            continue
        for number, part in enumerate(parts[split:], split):
            if not hasattr(found, part):
                owner = ".".join(parts[:number])
                raise LookupError(_nearest(owner, part, [each for each in dir(found) if each[0] != "_"]))
            found = getattr(found, part)
        return found
    raise LookupError(_nearest("", parts[0], ["torch", "operator", "math", "runtime"]))


def _nearest(owner: str, name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"{owner}.{close[0]}".lstrip(".") if close else f"a name in {owner or 'an installed package'}"


NAMESPACES = (
    "torch",
    "torch.Tensor",
    "torch.nn.functional",
    "torch._C._nn",
    "torch._C",
    "torch.linalg",
    "operator",
    "math",
    "builtins",
)
"""Where a function is looked for by its name first, since many of torch's do not say where they are (F.max_pool2d is a
closure)."""

_FIXED = {torch._C._nn.linear: "torch._C._nn.linear"}
"""It is F.linear too, but DeepSpeed's ZeRO-3 puts another function there in the whole process."""
