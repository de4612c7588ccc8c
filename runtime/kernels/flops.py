"""FLOPs: what torch.utils.flop_counter counts for our ops.

That module imports triton, half a second; so ours does not import it, and hands over its formulas when a user does.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def register_flops(name: str, formula: Callable[..., int]) -> None:
    """Count a call of lp::NAME by `formula`, of the arguments with shapes in place of tensors, and out_shape."""
    _FORMULAS[name] = formula
    if module := sys.modules.get(_COUNTER):
        _hand_over(module, name)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torch's counter as it would be found, once, and has the formulas handed over when it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        wrapped = spec_from_loader(fullname, _Loader(spec.loader), origin=spec.origin)
        if wrapped is not None:
            wrapped.has_location = spec.has_location
        return wrapped


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for name in _FORMULAS:
            _hand_over(module, name)


def _hand_over(module: Any, name: str) -> None:
    module.register_flop_formula(getattr(torch.ops.lp, name))(_FORMULAS[name])


_FORMULAS: dict[str, Callable[..., int]] = {}
