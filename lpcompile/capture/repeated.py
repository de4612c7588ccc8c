"""Repeated: which modules one forward calls several times, as far as recorded graphs show.

    calls of a module = the sum over its callers: calls of the caller x call nodes in its graph

A caller without a graph says nothing. Of a module's variants, the one with the most calls counts.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

from torch import nn

from lpcompile.capture.torch_layers import called_paths
from passes.ir.program import Unit


def repeated_modules(model: nn.Module, units: Iterable[Unit]) -> set[str]:
    """Paths of the modules that run more than once in one forward. A module that lies at several paths is one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: dict[tuple[nn.Module, nn.Module], int] = defaultdict(int)
    for unit in units:
        if unit.kind == "module" and unit.path in modules:
            counted = Counter(modules[path] for _, path in called_paths(unit) if path in modules)
            for child, count in counted.items():
                key = modules[unit.path], child
                calls[key] = max(count, calls[key])
    callers: dict[nn.Module, list[tuple[nn.Module, int]]] = defaultdict(list)
    for (caller, child), count in calls.items():
        callers[child].append((caller, count))
    totals: dict[nn.Module, int] = {}

    def total(module: nn.Module) -> int:
        if module not in totals:
            totals[module] = 1  # also for a module that calls itself
            totals[module] = sum(total(caller) * count for caller, count in callers[module]) or 1
        return totals[module]

    return {path for path, module in modules.items() if total(module) > 1}
