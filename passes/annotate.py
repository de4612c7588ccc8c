"""annotate: what the policy says of a site becomes a LayerSpec on its node; what nothing can run is refused, with the
reason.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.ir.gemm_nodes import Composite, GemmNode, Unreadable, read_gemm
from passes.ir.program import REPEATED, SITE, SPEC, Program
from passes.ir.stored_specs import spec_as_stored
from passes.ir.types import META
from passes.manager import Pass
from runtime.errors import NotSupported
from runtime.kernels.registry import choose
from runtime.kernels.request import GemmRequest
from runtime.numerics.free_axes import Side
from runtime.numerics.specs import ROLES, LayerSpec, QuantSpec
from runtime.ops.plan import contraction_of, parse_geometry
from runtime.ops.sum_scales import slot_name, why_not_scaled


@dataclass(frozen=True)
class Annotate(Pass):
    """Reads `program.specs`; writes `node.meta[SPEC]` and `program.refusals`."""

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
                spec = as_stored(gemm, spec)
                reason = refusal(gemm, spec, program.device)
                if not reason and node.meta.get(REPEATED) and spec.is_stochastic:
                    reason = "one forward runs it several times: stochastic rounding would draw the same bits each time"
                if reason:
                    program.refusals[site] = reason
                else:
                    node.meta[SPEC] = spec
                    changed = True
        return changed


def as_stored(gemm: GemmNode | Unreadable, spec: LayerSpec) -> LayerSpec:
    """The spec for the operands as they lie in memory."""
    return spec_as_stored(gemm.kind, gemm.geometry, spec) if isinstance(gemm, GemmNode) else spec


def _dtype_of(node: object) -> torch.dtype | None:
    """Of what the recorder saw, or torch.compile; an operation that a pass wrote gives the dtype of its first operand.
    None if it is not known.
    """
    while isinstance(node, fx.Node):
        seen = node.meta.get("val", node.meta.get(META))
        if seen is not None:
            dtype = getattr(seen, "dtype", None)
            return dtype if isinstance(dtype, torch.dtype) else None
        node = next(iter(node.all_input_nodes), None)
    return None


def _why_not_learned(spec: LayerSpec) -> str:
    """Why a quantizer with state has no gradient to learn by; "" if each has, or there is none."""
    for role, side, forward in (("bwd", "rhs", spec.fwd.rhs), ("grad", "rhs", spec.fwd.lhs)):
        operand = getattr(spec.role(role), side)  # type: ignore[arg-type]
        if operand.quantizer is not None and operand != forward:
            return f"{role} {side}: {operand} learns by what FWD casts, {forward}; use one cast in both, or none here"
    for role in ("bwd", "grad"):
        operand = spec.role(role).lhs  # type: ignore[arg-type]
        if operand.quantizer is not None:
            return f"{role} lhs: {operand.quantizer.kind} learns by a gradient, and the cast of one has none"
    return ""


def refusal(gemm: GemmNode | Unreadable, spec: LayerSpec, device: str) -> str | None:
    """Why nothing runs this GEMM as `spec`, which `as_stored` made, says; None if something does."""
    if isinstance(gemm, Unreadable):
        return gemm.reason
    if not all(isinstance(operand, fx.Node) for operand in (gemm.lhs, gemm.rhs)):
        return "an operand is not a tensor of the graph"
    for dtype in (_dtype_of(gemm.lhs), _dtype_of(gemm.rhs)):
        if not spec.is_identity and dtype is not None and not dtype.is_floating_point:
            return f"an operand is {dtype}, and only real numbers are cast"
    geometry = parse_geometry(gemm.geometry)
    contraction = contraction_of(gemm.kind, geometry)
    if reason := _why_not_learned(spec):
        return reason
    for role in ROLES:
        numbers = spec.role(role)
        if numbers.accumulator.is_open:
            return f"{role}: no accumulator was chosen; run choose-accumulator first"
        operands: tuple[tuple[Side, QuantSpec], ...] = (("lhs", numbers.lhs), ("rhs", numbers.rhs))
        for side, operand in operands:
            if operand.is_block and gemm.kind == "conv":
                name = slot_name(contraction, role, side)
                what = f"blocks of {operand.format} lie along one axis, and the sum of a {gemm.op} has several"
                return f"{role} {name}: {what}; use a scalar format such as e4m3, with a scale of granularity tensor"
            if reason := why_not_scaled(contraction, gemm.op, role, side, numbers):
                return f"{role} {reason}"
        try:
            choose(GemmRequest(gemm.kind, role, numbers, device))
        except NotSupported as error:
            return str(error)
    return None
