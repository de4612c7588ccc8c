"""Children: are the modules that a graph calls, and the containers around them, still those that it was installed over?

Each child carries a mark, an object of no content that copies as itself and that one pickle holds once: so a copy of a
model knows its own children, and a fresh module in the place of one is known to be another.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

MARK = "_lp_child"
"""Where the mark lies in the instance's __dict__."""


class Mark:
    """Equal to itself alone."""

    def __copy__(self) -> "Mark":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mark":
        return self


@dataclass(frozen=True)
class Children:
    """What was under a module when a graph was installed there."""

    called: tuple[tuple[str, tuple[str, ...], Mark, bool], ...] = ()
    """Path, its steps, the mark, and whether the instance had a forward of its own (a wrapper's)."""
    containers: tuple[tuple[str, tuple[str, ...], int], ...] = ()
    """Path, its steps, and how many children, of the lists that a forward goes through."""

    @staticmethod
    def of(module: nn.Module, paths: Iterable[str]) -> "Children":
        """Those at `paths`, which are marked now, and every container in the module."""
        called = []
        for path in dict.fromkeys(paths):
            child = module.get_submodule(path)
            called.append(
                (path, tuple(path.split(".")), vars(child).setdefault(MARK, Mark()), "forward" in vars(child))
            )
        return Children(tuple(called), tuple(_containers(module)))

    def differing(self, module: nn.Module) -> str | None:
        """What is no longer as it was, if anything. About 0.3 us per child."""
        for path, steps, size in self.containers:
            found = _find(module, steps)
            if found is None or len(found._modules) != size:
                size_now = "no more" if found is None else len(found._modules)
                return f"{path or 'the container'} has {size_now} children, compiled with {size}"
        for path, steps, mark, has_forward in self.called:
            child = _find(module, steps)
            if child is None or child.__dict__.get(MARK) is not mark:
                return f"child {path} is another module than the one that was compiled"
            if ("forward" in child.__dict__) is not has_forward:
                return f"child {path} has another forward than the one that was compiled"
        return None


def _containers(module: nn.Module, path: tuple[str, ...] = ()) -> Iterable[tuple[str, tuple[str, ...], int]]:
    """The module itself and containers below it, through nothing but containers."""
    if isinstance(module, _CONTAINERS):
        yield ".".join(path), path, len(module._modules)
    for name, child in module._modules.items():
        if isinstance(child, _CONTAINERS):
            yield from _containers(child, (*path, name))


def _find(module: nn.Module | None, steps: tuple[str, ...]) -> nn.Module | None:
    for step in steps:
        if module is None:
            return None
        module = module._modules.get(step)
    return module


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
