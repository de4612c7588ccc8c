"""share-casts: one cast where several GEMMs cast the same tensor alike (q, k and v; gate and up).

Within a graph, equal lp.scale and lp.quantize nodes become one. Across modules, a module that calls two leaves with the
same input casts it once itself and hands the cast down:

    %q = call_module[q_proj](%x)      becomes      %xq = lp.quantize(%x)
    %k = call_module[k_proj](%x)                   %q = call_module[q_proj](%x, lp_casts=(%xq, None))
                                                   %k = call_module[k_proj](%x, lp_casts=(%xq, None))

%x is still handed over: it carries the gradient, so gradients add up in the order they did before. A cast is not shared
across an in-place op, which may have changed the tensor, nor when it rounds stochastically.
"""

import copy
import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from passes.ir.program import AFFINE, CASTS, INPUT_AFFINE, Program, Unit
from passes.manager import Pass
from runtime.errors import PassError
from runtime.ops import OPS

_SCALE, _QUANTIZE = OPS["lp.scale"].run, OPS["lp.quantize"].run


@dataclass(frozen=True)
class ShareCasts(Pass):
    """`across=modules` also shares among the leaves that a module calls; `across=graph` only within each graph."""

    name: ClassVar[str] = "share-casts"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "cast")
    across: str = "modules"

    def __post_init__(self) -> None:
        if self.across not in ("modules", "graph"):
            raise PassError("no such reach", where="share-casts{across}", expected="modules or graph", got=self.across)

    def run(self, program: Program) -> bool:
        changed = False
        if self.across == "modules":
            for unit in program.units.values():
                if unit.kind == "module":
                    changed |= _feed_leaves(program, unit)
        for _, graph in program.graphs():
            changed |= _merge_equal(graph)
        return changed


def _feed_leaves(program: Program, unit: Unit) -> bool:
    """Cast in the caller what two of its leaves cast alike; the equal casts are merged afterwards."""
    consumers: dict[tuple[fx.Node, str, int], int] = defaultdict(int)
    calls: list[tuple[fx.Node, Unit, list[fx.Node], int]] = []
    epoch = 0
    for node in unit.graph.nodes:
        epoch += _mutates(node)
        leaf = _called_leaf(program, unit, node)
        if leaf is None:
            continue
        casts = _casts_of_input(_callee(leaf, node))
        calls.append((node, leaf, casts, epoch))
        for spec in {str(cast.kwargs["spec"]) for cast in casts}:
            consumers[node.args[0], spec, epoch] += 1
    changed = False
    for node, leaf, casts, epoch in calls:
        if any(consumers[node.args[0], str(cast.kwargs["spec"]), epoch] > 1 for cast in casts):  # type: ignore[index]
            _feed(unit.graph, node, leaf, casts)
            changed = True
    return changed


def _called_leaf(program: Program, unit: Unit, node: fx.Node) -> Unit | None:
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or not {*node.kwargs} <= {AFFINE, INPUT_AFFINE}:
        return None
    leaf = program.called_leaf(unit, node)
    return None if leaf is None or (leaf.fed is not None and _has_other_folds(program, leaf)) else leaf


def _has_other_folds(program: Program, leaf: Unit) -> bool:
    """Whether a fed leaf that batch norms are folded into has other calls: its graph takes casts of all, or of none."""
    callers = [each for each in program.units.values() if each.kind == "module"]
    calls = [call for each in callers for call in each.graph.nodes if program.called_leaf(each, call) is leaf]
    is_folded = any(name in call.kwargs for call in calls for name in (AFFINE, INPUT_AFFINE))
    return is_folded and len(calls) > 1


def _callee(leaf: Unit, call: fx.Node) -> fx.Graph:
    """The graph that a call runs."""
    return leaf.fed if leaf.fed is not None and call.kwargs else leaf.graph


def _casts_of_input(graph: fx.Graph) -> list[fx.Node]:
    x = next(iter(graph.nodes))
    casts = [node for node in graph.nodes if node.target is _QUANTIZE and node.args[0] is x]
    return casts if all(_is_shareable(cast) for cast in casts) else []


def _is_shareable(cast: fx.Node) -> bool:
    return "stochastic" not in str(cast.kwargs["spec"])


def _feed(graph: fx.Graph, call: fx.Node, leaf: Unit, casts: list[fx.Node]) -> None:
    x = call.args[0]
    handed: list[fx.Node | None] = []
    with graph.inserting_before(call):
        for cast in casts:
            spec = cast.kwargs["spec"]
            scale = None if cast.args[1] is None else graph.call_function(_SCALE, (x,), {"spec": spec})
            handed += [graph.call_function(_QUANTIZE, (x, scale, None), dict(cast.kwargs)), scale]
    if leaf.fed is None or call.kwargs:
        leaf.fed = _fed_copy(_callee(leaf, call))
    call.kwargs = {CASTS: tuple(handed), **call.kwargs}


def _fed_copy(graph: fx.Graph) -> fx.Graph:
    """The leaf's graph with the casts of its input read from the placeholder `lp_casts` = (q0, s0, q1, s1, ...)."""
    fed = copy.deepcopy(graph)
    x = next(iter(fed.nodes))
    with fed.inserting_after(x):
        handed = fed.placeholder(CASTS, default_value=None)
    for number, cast in enumerate(_casts_of_input(fed)):
        scale = cast.args[1]
        for position, node in ((2 * number, cast), (2 * number + 1, scale)):
            if isinstance(node, fx.Node):
                with fed.inserting_before(cast if node is cast else node):
                    node.replace_all_uses_with(fed.call_function(operator.getitem, (handed, position)))
        fed.erase_node(cast)
        if isinstance(scale, fx.Node):
            fed.erase_node(scale)
    return fed


def _merge_equal(graph: fx.Graph) -> bool:
    seen: dict[Any, fx.Node] = {}
    changed = False
    for node in list(graph.nodes):
        if _mutates(node):
            seen.clear()
        if node.target not in (_SCALE, _QUANTIZE) or not _is_shareable(node):
            continue
        key = (node.target, node.args, node.kwargs["spec"])
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
            changed = True
        else:
            seen[key] = node
    return changed


def _mutates(node: fx.Node) -> bool:
    """True for an op that writes into an argument: add_, __iadd__, copy_, __setitem__, anything with `out=`."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (
        (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name in ("__setitem__", "setitem")
    )
    return node.op in ("call_function", "call_method") and (in_place or node.kwargs.get("out") is not None)
