"""annotate: what the policy says of a site becomes a LayerSpec on its node; what nothing can run is refused, with the
reason.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from passes.ir.gemm_nodes import GemmNode, Unreadable, read_gemm
from passes.ir.program import SITE, SPEC, Program
from passes.manager import Pass
from runtime.contractions import Conv
from runtime.errors import NotSupported
from runtime.gemms import KINDS, parse_geometry, varies_along_sum
from runtime.kernels.dispatch import GemmRequest, choose
from runtime.numerics.specs import ROLES, Granularity, LayerSpec, QuantSpec


@dataclass(frozen=True)
class Annotate(Pass):
    """Reads `program.specs`; writes `node.meta[SPEC]` and `program.refusals`."""

    name: ClassVar[str] = "annotate"

    def run(self, program: Program) -> bool:
        changed = False
        for _, graph in program.graphs():
            for node in graph.nodes:
                site = node.meta.get(SITE)
                spec = program.specs.get(site) if site else None
                if spec is None:
                    continue
                gemm = read_gemm(node) or Unreadable(str(node.target), "the compiler does not read this op as a GEMM")
                spec = _as_stored(gemm, spec)
                reason = _refusal(gemm, spec, program.device)
                if reason:
                    program.refusals[site] = reason
                else:
                    node.meta[SPEC] = spec
                    changed = True
        return changed


def _as_stored(gemm: GemmNode | Unreadable, spec: LayerSpec) -> LayerSpec:
    """The spec for the weight as it lies in memory: a policy speaks of w_NK, and transformers' Conv1D holds w_KN."""
    if not isinstance(gemm, GemmNode) or gemm.kind != "linear_kn":
        return spec
    fwd, bwd = (replace(numbers, rhs=_transposed(numbers.rhs)) for numbers in (spec.fwd, spec.bwd))
    return LayerSpec(fwd, bwd, spec.grad)


def _transposed(spec: QuantSpec) -> QuantSpec:
    if spec.scale is None:
        return spec
    other: dict[Granularity, Granularity] = {"row": "column", "column": "row"}
    granularity = other.get(spec.scale.granularity, spec.scale.granularity)
    return replace(spec, scale=replace(spec.scale, granularity=granularity, block=spec.scale.block[::-1]))


def _refusal(gemm: GemmNode | Unreadable, spec: LayerSpec, device: str) -> str | None:
    if isinstance(gemm, Unreadable):
        return gemm.reason
    if not all(isinstance(operand, fx.Node) for operand in (gemm.lhs, gemm.rhs)):
        return "an operand is not a tensor of the graph"
    geometry = parse_geometry(gemm.geometry)
    contraction = Conv(geometry) if geometry else KINDS[gemm.kind]
    for role in ROLES:
        numbers = spec.role(role)
        for side, operand in (("lhs", numbers.lhs), ("rhs", numbers.rhs)):
            if varies_along_sum(contraction, role, side, operand) and operand.scale and operand.scale.rule != "pow2":  # type: ignore[arg-type]
                free = contraction.free_axis[role, side]  # type: ignore[index]
                return (
                    f"{role} {side}: a scale per {operand.scale.granularity} varies along the sum of a {gemm.op}; "
                    f"use granularity {'tensor' if free == 'none' else free}, or rule pow2"
                )
        try:
            choose(GemmRequest(gemm.kind, role, numbers, device))
        except NotSupported as error:
            return str(error)
    return None
