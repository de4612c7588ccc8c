"""Leaf code: a leaf module runs its compiled graph, one per phase of the schedule, and takes from a caller what that
offers by keyword: casts, the scale and shift of a batch norm. A leaf of several products runs its forward by parts,
each part a graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lpcompile.capture.cast_origins import ORIGINS, is_origin
from lpcompile.frontends.graph_code import GraphCode
from lpcompile.frontends.install import install
from lpcompile.frontends.leaves.find import CompositeForward
from passes.ir.program import HANDED, STATE, Unit
from runtime.errors import NotSupported
from runtime.ops.plan import parse_geometry
from runtime.state import RunState


def install_leaf(module: nn.Module, units: list[Unit | None], state: RunState) -> None:
    """Let the graphs of `units`, one per phase, be the forward of a leaf; None where the policy leaves the leaf
    alone.
    """
    module.__dict__[STATE] = state
    install(module, LeafForward([None if unit is None else _LeafPhase.of(unit) for unit in units], state))


@dataclass(frozen=True)
class _LeafPhase:
    """The graphs of one phase. `floor` needs its input alone; `fed`, if there is one, takes what `keywords` name from
    the caller.
    """

    floor: GraphCode
    fed: GraphCode | None
    operands: tuple[str, ...]
    keywords: tuple[str, ...]

    @staticmethod
    def of(unit: Unit) -> "_LeafPhase":
        fed = None if unit.fed is None else GraphCode(unit.fed, switches_grad_mode=False)
        floor = GraphCode(unit.graph, switches_grad_mode=False)
        for code in (floor, fed):
            if code is not None:
                code.compiled()  # torch.compile traces through a function, and not through the making of one
        operands = tuple(str(node.target) for node in unit.graph.find_nodes(op="placeholder"))
        return _LeafPhase(floor, fed, operands, _keywords(unit))


def _keywords(unit: Unit) -> tuple[str, ...]:
    """What a fed graph takes beside its operands, in its order."""
    names = [] if unit.fed is None else [str(node.target) for node in unit.fed.find_nodes(op="placeholder")]
    return tuple(name for name in names if name in HANDED)


@dataclass
class LeafForward:
    """What is installed under a leaf: its graphs by phase, and the state that says which phase it is."""

    phases: list[_LeafPhase | None]
    state: RunState

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The forward: y = code(x), x by position or by its name, with or without what is handed down."""
        phase = self.phases[self.state.phase]
        own = {name: value for name, value in kwargs.items() if name not in _KEYWORDS}
        if phase is None or len(args) + len(own) != 1 or not own.keys() <= {*phase.operands}:
            return original(module, *args, **own)  # which says what is wrong with its arguments
        return _product(phase, module, kwargs, *args, *own.values())

    @property
    def is_picklable(self) -> bool:
        return all(phase is None or phase.floor.is_picklable for phase in self.phases)


def install_composite(
    module: nn.Module, forward: CompositeForward, phases: list[dict[str, Unit] | None], state: RunState
) -> None:
    """Let `forward` run a leaf of several products with the graphs of its parts, by phase; None where the policy leaves
    the leaf alone.
    """
    module.__dict__[STATE] = state
    codes = [None if units is None else {part: _LeafPhase.of(unit) for part, unit in units.items()} for units in phases]
    install(module, CompositeLeafForward(forward, codes, state))


@dataclass
class CompositeLeafForward:
    """What is installed under a leaf of several products: its forward by parts, and the parts' graphs by phase."""

    forward: CompositeForward
    phases: list[dict[str, _LeafPhase] | None]
    state: RunState

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        codes = self.phases[self.state.phase]
        if codes is None:
            return original(module, *args, **kwargs)
        handed = {name: value for name, value in kwargs.items() if name in _KEYWORDS}
        own = {name: value for name, value in kwargs.items() if name not in _KEYWORDS}
        products = {part: partial(_product, code, module, handed) for part, code in codes.items()}
        return self.forward(module, products, *args, **own)

    @property
    def is_picklable(self) -> bool:
        return all(codes is None or all(code.floor.is_picklable for code in codes.values()) for codes in self.phases)


def _product(phase: _LeafPhase, module: nn.Module, handed: Mapping[str, Any], *operands: Any, **how: Any) -> Any:
    """The product with what is handed down, unless that was made from another tensor than arrived."""
    if how.get("geometry") and (built := parse_geometry(_geometry_of(phase))) != how["geometry"]:
        raise NotSupported(
            f"a {type(module).__name__} compiled from whole graphs takes no geometry but its own",
            where='lpcompile(mode="infer")',
            expected=str(built),
            got=str(how["geometry"]),
        )
    if phase.fed is None or phase.keywords[0] not in handed or not _is_of(operands[0], handed):
        return phase.floor(module, operands)[0]
    return phase.fed(module, (*operands, *(handed[name] for name in phase.keywords)))[0]


def _is_of(x: Tensor, handed: Mapping[str, Any]) -> bool:
    return ORIGINS not in handed or is_origin(x, handed[ORIGINS])


_KEYWORDS = {*HANDED, ORIGINS}


def _geometry_of(phase: _LeafPhase) -> str:
    return next((str(node.kwargs["geometry"]) for node in phase.floor.graph.nodes if "geometry" in node.kwargs), "")
