"""annotate: what the policy says of a site becomes a LayerSpec on its node; what nothing can run is refused, with the
reason, a role alone where others run.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.ir.gemm_nodes import Composite, GemmNode, Unreadable, read_gemm
from passes.ir.program import REPEATED, SITE, SPEC, Program
from passes.ir.stored_specs import spec_as_stored, without
from passes.ir.types import META
from passes.manager import Pass
from passes.place import refusals, refused_roles
from runtime.numerics.specs import LayerSpec, Role


@dataclass(frozen=True)
class Annotate(Pass):
    """Reads `program.specs`; writes `node.meta[SPEC]` and `program.refusals`, into `program.choices` refused roles."""

    name: ClassVar[str] = "annotate"
    requires: ClassVar[tuple[str, ...]] = ("decomposed", "uncast")

    def run(self, program: Program) -> bool:
        changed = False
        for _, graph in program.graphs():
            for node in graph.nodes:
                site = node.meta.get(SITE)
                spec = None if site is None else program.specs.get(site)
                if spec is None:
                    continue
                gemm = read_gemm(node) or Unreadable(str(node.target), "the compiler does not read this op as a GEMM")
                assert not isinstance(gemm, Composite)  # by the condition "decomposed"
                if isinstance(gemm, GemmNode):
                    spec = spec_as_stored(gemm.kind, gemm.geometry, spec)
                found = refused(gemm, spec, program.device)
                roles, reason = ({}, found) if isinstance(found, str) else (found, "")
                if not reason and node.meta.get(REPEATED) and spec.is_stochastic:
                    reason = "one forward runs it several times: stochastic rounding would draw the same bits each time"
                if reason:
                    program.refusals[site] = reason
                else:
                    node.meta[SPEC] = without(spec, roles)
                    if roles and isinstance(gemm, GemmNode):
                        program.choices[site] = refusals(gemm.kind, roles, program.device)
                    changed = True
        return changed


def _dtype_of(node: object) -> torch.dtype | None:
    """Of the example call, or of torch.compile; an operation that a pass wrote gives the dtype of its first operand.
    None if it is not known.
    """
    while isinstance(node, fx.Node):
        seen = node.meta.get("val", node.meta.get(META))
        if seen is not None:
            dtype = getattr(seen, "dtype", None)
            return dtype if isinstance(dtype, torch.dtype) else None
        node = next(iter(node.all_input_nodes), None)
    return None


def refused(gemm: GemmNode | Unreadable, spec: LayerSpec, device: str) -> dict[Role, str] | str:
    """The roles that nothing runs as `spec`, for operands as they lie in memory, says, with the reason; or why nothing
    runs any.
    """
    if isinstance(gemm, Unreadable):
        return gemm.reason
    if not all(isinstance(operand, fx.Node) for operand in (gemm.lhs, gemm.rhs)):
        return "an operand is not a tensor"
    for dtype in (_dtype_of(gemm.lhs), _dtype_of(gemm.rhs)):
        if not spec.is_identity and dtype is not None and not dtype.is_floating_point:
            return f"an operand is {dtype}, and only real numbers are cast"
    return refused_roles(gemm.kind, gemm.geometry, gemm.op, spec, device)
