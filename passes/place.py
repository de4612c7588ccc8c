"""Place: what runs a GEMM that a policy names, or why nothing does; by its kind alone, without a graph."""

from dataclasses import dataclass

from passes.analysis.lengths import Lengths
from passes.analysis.room import why_no_room
from passes.ir.stored_specs import spec_as_stored
from runtime.errors import NotSupported
from runtime.kernels.registry import Choice, choose
from runtime.kernels.request import GemmRequest
from runtime.numerics.free_axes import Side
from runtime.numerics.specs import ROLES, LayerSpec, QuantSpec, Role
from runtime.ops.plan import contraction_of, parse_geometry
from runtime.ops.sum_scales import slot_name, why_not_scaled


@dataclass(frozen=True)
class Placed:
    """A GEMM that runs: `spec` for the operands as they lie in memory, and the backend of each role."""

    spec: LayerSpec
    choices: dict[Role, Choice]

    @property
    def methods(self) -> tuple[str, str, str]:
        fwd, bwd, grad = (self.choices[role].method for role in ROLES)
        return fwd, bwd, grad


def place(kind: str, op: str, spec: LayerSpec, device: str, lengths: Lengths | None = None) -> Placed | str:
    """How the GEMMs of a site run, or why they cannot. Of a convolution's geometry only matters whether it is
    transposed. `lengths`: of their sums, where they are known."""
    geometry = (_TRANSPOSED if "transpose" in op else _PLAIN) if kind == "conv" else ""
    stored = spec_as_stored(kind, geometry, spec)
    if reason := why_refused(kind, geometry, op, stored, device, lengths):
        return reason
    return Placed(stored, {role: choose(GemmRequest(kind, role, stored.role(role), device)) for role in ROLES})


def why_refused(
    kind: str, geometry: str, op: str, spec: LayerSpec, device: str, lengths: Lengths | None = None
) -> str | None:
    """Why nothing runs a GEMM as `spec`, which is for the operands as stored, says; None if something does."""
    contraction = contraction_of(kind, parse_geometry(geometry))
    if reason := _why_not_learned(spec):
        return reason
    for role in ROLES:
        numbers = spec.role(role)
        if numbers.accumulator.is_open:
            return f"{role}: no accumulator was chosen; run choose-accumulator first"
        operands: tuple[tuple[Side, QuantSpec], ...] = (("lhs", numbers.lhs), ("rhs", numbers.rhs))
        for side, operand in operands:
            if operand.is_block and kind == "conv":
                name = slot_name(contraction, role, side)
                what = f"blocks of {operand.format} lie along one axis, and the sum of a {op} has several"
                return f"{role} {name}: {what}; use a scalar format such as e4m3, with a scale of granularity tensor"
            if reason := why_not_scaled(contraction, op, role, side, numbers):
                return f"{role} {reason}"
        if reason := why_no_room(role, numbers, (lengths or {}).get(role)):
            return reason
        try:
            choose(GemmRequest(kind, role, numbers, device))
        except NotSupported as error:
            return str(error)
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


_PLAIN = "stride=1 padding=0 dilation=1 groups=1"
_TRANSPOSED = f"{_PLAIN} output_padding=0"
