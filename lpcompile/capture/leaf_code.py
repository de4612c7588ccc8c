"""Leaf code: a leaf module runs its compiled graph, one per phase of the schedule, and takes casts from a caller that
offers them. A leaf of several products runs its forward by parts, each part a graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from lpcompile.capture.graph_code import GraphCode
from lpcompile.capture.install import RECORD, captured_class
from lpcompile.capture.leaves import CompositeForward
from passes.ir.program import CASTS, STATE, Unit
from runtime.state import RunState


def install_leaf(module: nn.Module, units: list[Unit | None], state: RunState) -> None:
    """Let the graphs of `units`, one per phase, be the forward of a leaf; None where the policy leaves the leaf
    alone.
    """
    module.__class__ = captured_class(type(module))
    module.__dict__[STATE] = state
    module.__dict__[RECORD] = LeafForward([None if unit is None else _LeafPhase.of(unit) for unit in units], state)


@dataclass(frozen=True)
class _LeafPhase:
    """The graphs of one phase. `floor` casts its own input; `fed`, if there is one, takes the casts from the caller."""

    floor: GraphCode
    fed: GraphCode | None

    @staticmethod
    def of(unit: Unit) -> "_LeafPhase":
        fed = None if unit.fed is None else GraphCode(unit.fed, switches_grad_mode=False)
        floor = GraphCode(unit.graph, switches_grad_mode=False)
        for code in (floor, fed):
            if code is not None:
                code.compiled()  # torch.compile traces through a function, and not through the making of one
        return _LeafPhase(floor, fed)


@dataclass
class LeafForward:
    """What is installed under a leaf: its graphs by phase, and the state that says which phase it is."""

    phases: list[_LeafPhase | None]
    state: RunState

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The forward: y = code(x), x by position or by its name, with or without casts handed down."""
        phase = self.phases[self.state.phase]
        casts = kwargs.get(CASTS)
        inputs = args or tuple(value for name, value in kwargs.items() if name != CASTS)
        if phase is None:
            return original(module, *inputs)
        if casts is None or phase.fed is None:
            return phase.floor(module, inputs)[0]
        return phase.fed(module, (*inputs, casts))[0]

    @property
    def is_picklable(self) -> bool:
        return all(phase is None or phase.floor.is_picklable for phase in self.phases)


def install_composite(
    module: nn.Module, forward: CompositeForward, phases: list[dict[str, Unit] | None], state: RunState
) -> None:
    """Let `forward` run a leaf of several products with the graphs of its parts, by phase; None where the policy leaves
    the leaf alone.
    """
    module.__class__ = captured_class(type(module))
    module.__dict__[STATE] = state
    codes = [
        None
        if units is None
        else {part: GraphCode(unit.graph, switches_grad_mode=False) for part, unit in units.items()}
        for units in phases
    ]
    module.__dict__[RECORD] = CompositeLeafForward(forward, codes, state)


@dataclass
class CompositeLeafForward:
    """What is installed under a leaf of several products: its forward by parts, and the parts' graphs by phase."""

    forward: CompositeForward
    phases: list[dict[str, GraphCode] | None]
    state: RunState

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        codes = self.phases[self.state.phase]
        if codes is None:
            return original(module, *args, **kwargs)
        products = {part: partial(_first_output, code, module) for part, code in codes.items()}
        return self.forward(module, products, *args, **kwargs)

    @property
    def is_picklable(self) -> bool:
        return all(codes is None or all(code.is_picklable for code in codes.values()) for codes in self.phases)


def _first_output(code: GraphCode, module: nn.Module, *operands: Any) -> Any:
    return code(module, operands)[0]
