"""insert-casts: an annotated GEMM becomes lp.gemm, fed by lp.scale and lp.quantize nodes.

    %y = linear(%x, %w, %b)      becomes      %s = lp.scale(%x)        where the spec has a scale
                                              %q = lp.quantize(%x, %s)
                                              ... the same for %w ...
                                              %y = lp.gemm(%x, %w, %b, %q, %s, ...)

GRAD's cast of the input is its own node only where its spec is not FWD's; a weight is cast again in backward by lp.gemm
itself.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from passes.ir.gemm_nodes import GemmNode, read_gemm
from passes.ir.program import GROUP, SITE, SPEC, WEIGHT, Program, site_numbers, state_node
from passes.manager import Pass
from runtime.numerics.specs import QuantSpec
from runtime.ops.dialect import OPS


@dataclass(frozen=True)
class InsertCasts(Pass):
    """Rewrites every node that carries `meta[SPEC]`."""

    name: ClassVar[str] = "insert-casts"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)

    def run(self, program: Program) -> bool:
        numbers = site_numbers(program)
        changed = False
        for _, graph in program.graphs():
            for node in list(graph.nodes):
                if SPEC in node.meta and node.target is not OPS["lp.gemm"].run:
                    number = numbers[node.meta[SITE]] + node.meta.get(GROUP, 0) * len(numbers)
                    _rewrite(graph, node, number)
                    changed = True
        return changed


def _rewrite(graph: fx.Graph, node: fx.Node, number: int) -> None:
    gemm = read_gemm(node)
    assert isinstance(gemm, GemmNode)
    spec, state = node.meta[SPEC], state_node(graph)
    has_weight = gemm.rhs.op == "get_attr" or gemm.rhs.meta.get(WEIGHT, False)
    with graph.inserting_before(node):
        fwd_lhs = _cast(graph, gemm.lhs, spec.fwd.lhs, state, number, slot=0)
        fwd_rhs = _cast(graph, gemm.rhs, spec.fwd.rhs, state, number, slot=1)
        if has_weight:
            bwd_rhs: tuple[fx.Node | None, fx.Node | None] = (None, None)
        else:
            bwd_rhs = (
                fwd_rhs if spec.bwd.rhs == spec.fwd.rhs else _cast(graph, gemm.rhs, spec.bwd.rhs, state, number, slot=2)
            )
        grad_lhs = (
            fwd_lhs if spec.grad.rhs == spec.fwd.lhs else _cast(graph, gemm.lhs, spec.grad.rhs, state, number, slot=3)
        )
        attributes: dict[str, Any] = {"kind": gemm.kind, "spec": str(spec), "methods": ",,", "site": number}
        if gemm.geometry:
            attributes["geometry"] = gemm.geometry
        operands = (gemm.lhs, gemm.rhs, gemm.bias, *fwd_lhs, *fwd_rhs, *bwd_rhs, *grad_lhs, state, None)
        new = graph.call_function(OPS["lp.gemm"].run, operands, attributes)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _cast(
    graph: fx.Graph, x: fx.Node, spec: QuantSpec, state: fx.Node, number: int, slot: int
) -> tuple[fx.Node, fx.Node | None]:
    scale = graph.call_function(OPS["lp.scale"].run, (x,), {"spec": str(spec)}) if spec.has_scale else None
    needs_state = state if spec.rounding == "stochastic" else None
    attributes: dict[str, Any] = {"spec": str(spec), "site": number, "slot": slot}
    return graph.call_function(OPS["lp.quantize"].run, (x, scale, needs_state), attributes), scale
