"""insert-casts: an annotated GEMM becomes lp.gemm, fed by lp.scale and lp.quantize nodes.

    %y = linear(%x, %w, %b)      becomes      %s = lp.scale(%x)        where the spec has a scale
                                              %q = lp.quantize(%x, %s)
                                              ... the same for %w ...
                                              %y = lp.gemm(%x, %w, %b, %q, %s, ...)

A cast with a transform is one of %r = lp.rotate(%x), scale and grid values both. GRAD's cast of the input is its own
node only where its spec is not FWD's; a weight is cast again in backward by lp.gemm itself. Where a quantizer with
state has the scale, it is asked, and the carrier of the gradient passes one that learns:

    %s = lp.learned_scale(%x)   %c = lp.carrier(%x, %s)   %q = lp.quantize(%x, %s)   %y = lp.gemm(%c, ...)
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from passes.ir.gemm_nodes import GemmNode, read_gemm
from passes.ir.operands import call_op
from passes.ir.program import GROUP, SITE, SPEC, WEIGHT, Program, site_numbers, state_node
from passes.manager import Pass
from runtime.numerics.specs import QuantSpec
from runtime.ops.dialect import OPS
from runtime.ops.plan import print_geometry
from runtime.quantize.owners import owner_of


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
        lhs, fwd_lhs = _cast(graph, gemm.lhs, spec.fwd.lhs, state, number, 0, owner_of(node.meta[SITE], "x"))
        rhs, fwd_rhs = _cast(graph, gemm.rhs, spec.fwd.rhs, state, number, 1, owner_of(node.meta[SITE], "w"))
        bwd_rhs: tuple[fx.Node | None, fx.Node | None] = (None, None)
        if spec.bwd.rhs == spec.fwd.rhs and (not has_weight or spec.fwd.rhs.quantizer):
            bwd_rhs = fwd_rhs
        elif not has_weight or spec.bwd.rhs.quantizer:
            bwd_rhs = _cast(graph, gemm.rhs, spec.bwd.rhs, state, number, 2, owner_of(node.meta[SITE], "w_bwd"))[1]
        grad_lhs = fwd_lhs
        if spec.grad.rhs != spec.fwd.lhs:
            grad_lhs = _cast(graph, gemm.lhs, spec.grad.rhs, state, number, 3, owner_of(node.meta[SITE], "x_grad"))[1]
        attributes: dict[str, Any] = {"kind": gemm.kind, "spec": str(spec), "kernels": ",,", "site": number}
        if gemm.geometry:
            attributes["geometry"] = print_geometry(gemm.geometry)
        operands: dict[str, fx.Node | None] = {"lhs": lhs, "rhs": rhs, "bias": gemm.bias, "state": state}
        casts = {"fwd_lhs": fwd_lhs, "fwd_rhs": fwd_rhs, "bwd_rhs": bwd_rhs, "grad_lhs": grad_lhs}
        for name, (grid, scale) in casts.items():
            operands |= {name: grid, f"{name}_scale": scale}
        new = call_op(graph, "lp.gemm", operands, attributes)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _cast(
    graph: fx.Graph, x: fx.Node, spec: QuantSpec, state: fx.Node, number: int, slot: int, quantizer: str = ""
) -> tuple[fx.Node, tuple[fx.Node, fx.Node | None]]:
    """What carries the gradient of x, and its cast: grid and scale. quantizer: the name of the one of the spec."""
    carrier, scale, attributes = x, None, {"spec": str(spec)}
    if spec.quantizer is not None:
        attributes["quantizer"] = quantizer
        scale = call_op(graph, "lp.learned_scale", {"x": x, "state": state}, {**attributes})
        if spec.quantizer.learns:
            carrier = call_op(graph, "lp.carrier", {"x": x, "s": scale, "state": state}, {**attributes})
    needs_state = state if spec.is_stochastic else None
    keyed: dict[str, Any] = {**attributes, "site": number, "slot": slot}
    if spec.transform is not None:
        x = call_op(graph, "lp.rotate", {"x": x, "state": needs_state}, {**keyed})
    if spec.quantizer is None and spec.has_scale:
        scale = call_op(graph, "lp.scale", {"x": x}, {**attributes})
    return carrier, (call_op(graph, "lp.quantize", {"x": x, "s": scale, "state": needs_state}, keyed), scale)
