"""share-casts: one cast where several GEMMs cast the same tensor alike (q, k and v; gate and up).

Within a graph, equal lp.scale and lp.quantize nodes become one. Across modules, a module that calls two leaves with the
same input casts it once itself and hands the cast down:

    %q = call_module[q_proj](%x)      becomes      %xq = lp.quantize(%x)
    %k = call_module[k_proj](%x)                   %q = call_module[q_proj](%x, lp_casts=(%xq, None))
                                                   %k = call_module[k_proj](%x, lp_casts=(%xq, None))

%x is still handed over: it carries the gradient, so gradients add up in the order they did before. A cast is not shared
across an in-place op, which may have changed the tensor, nor when it rounds stochastically; and casts are alike only
if their keys are (passes/cast_keys.py): q, k and v with a learned clip each cast one spec in three ways.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from passes.analysis.writes import epochs
from passes.cast_keys import cast_key
from passes.fed_leaves import QUANTIZE, SCALE, cast_like, casts_of_input, feed, is_shareable, unfed_leaf
from passes.ir.program import Program, Unit
from passes.manager import Pass
from runtime.errors import PassError
from runtime.ops.dialect import OPS
from runtime.quantize.qtensor import CastKey

_CASTS = (SCALE, OPS["lp.learned_scale"].run, OPS["lp.carrier"].run, QUANTIZE)


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
        for unit in program.units.values():
            for graph in filter(None, (unit.graph, unit.fed)):
                changed |= _merge_equal(graph, epochs(program, unit.path, graph))
        return changed


def _feed_leaves(program: Program, unit: Unit) -> bool:
    """Cast in the caller what two of its leaves cast alike; the equal casts are merged afterwards."""
    consumers: dict[tuple[fx.Node, CastKey, int], int] = defaultdict(int)
    calls: list[tuple[fx.Node, Unit, list[fx.Node], int]] = []
    epoch_of = epochs(program, unit.path, unit.graph)
    for node in unit.graph.nodes:
        leaf = unfed_leaf(program, unit, node)
        if leaf is None:
            continue
        casts = casts_of_input(leaf.graph)
        calls.append((node, leaf, casts, epoch_of[node]))
        for key in {cast_key(cast) for cast in casts}:
            consumers[node.args[0], key, epoch_of[node]] += 1
    changed = False
    for node, leaf, casts, epoch in calls:
        if any(consumers[node.args[0], cast_key(cast), epoch] > 1 for cast in casts):  # type: ignore[index]
            with unit.graph.inserting_before(node):
                feed(node, leaf, [cast_like(unit.graph, node.args[0], cast) for cast in casts])  # type: ignore[arg-type]
            changed = True
    return changed


def _merge_equal(graph: fx.Graph, epoch_of: dict[fx.Node, int]) -> bool:
    seen: dict[Any, fx.Node] = {}
    changed = False
    for node in list(graph.nodes):
        if node.target not in _CASTS or not is_shareable(node):
            continue
        key = (node.target, node.args, cast_key(node), epoch_of[node])
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
            changed = True
        else:
            seen[key] = node
    return changed
