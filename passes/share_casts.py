"""share-casts: one cast where several GEMMs cast the same tensor alike (q, k and v; gate and up).

Equal lp.scale and lp.quantize nodes of a graph become one:

    %xq = lp.quantize(%x)                  becomes      %xq = lp.quantize(%x)
    %q = lp.gemm(%x, %wq, %xq, ...)                     %q = lp.gemm(%x, %wq, %xq, ...)
    %xk = lp.quantize(%x)                               %k = lp.gemm(%x, %wk, %xq, ...)
    %k = lp.gemm(%x, %wk, %xk, ...)

%x is still handed over: it carries the gradient, so gradients add up in the order they did before. A cast is not shared
across an in-place op, which may have changed the tensor, nor when it rounds stochastically; and casts are alike only
if their keys are (passes/cast_keys.py): q, k and v with a learned clip each cast one spec in three ways.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from passes.analysis.writes import epochs
from passes.cast_keys import QUANTIZE, SCALE, cast_key
from passes.ir.program import Program
from passes.manager import Pass
from runtime.ops.dialect import OPS

_CASTS = (OPS["lp.rotate"].run, SCALE, OPS["lp.learned_scale"].run, OPS["lp.carrier"].run, QUANTIZE)


@dataclass(frozen=True)
class ShareCasts(Pass):
    """Within each graph."""

    name: ClassVar[str] = "share-casts"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "cast")

    def run(self, program: Program) -> bool:
        changed = False
        for unit in program.units.values():
            changed |= _merge_equal(unit.graph, epochs(unit.graph))
        return changed


def _merge_equal(graph: fx.Graph, epoch_of: dict[fx.Node, int]) -> bool:
    seen: dict[Any, fx.Node] = {}
    changed = False
    for node in list(graph.nodes):
        if node.target not in _CASTS or cast_key(node).is_drawn:
            continue
        key = (node.target, node.args, cast_key(node), epoch_of[node])
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
            changed = True
        else:
            seen[key] = node
    return changed
