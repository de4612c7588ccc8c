"""Place: what runs each role of a GEMM that a policy names, or why nothing does; by its kind alone, without a graph."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from passes.analysis.lengths import Lengths
from passes.analysis.room import why_no_room
from passes.ir.stored_specs import spec_as_stored, without
from runtime.errors import NotSupported
from runtime.kernels.registry import Choice, choose
from runtime.kernels.request import GemmRequest
from runtime.numerics.free_axes import Side
from runtime.numerics.specs import ROLES, GemmSpec, LayerSpec, QuantSpec, Role
from runtime.ops.contractions import ConvGeometry
from runtime.ops.plan import contraction_of
from runtime.ops.sum_scales import slot_name, why_not_scaled


@dataclass(frozen=True)
class Placed:
    """A GEMM that runs: `spec` for the operands as they lie in memory, and the backend of each role. A role that
    nothing can run as the policy says is the identity in `spec`, and refused in `choices`.
    """

    spec: LayerSpec
    choices: dict[Role, Choice]

    @property
    def kernels(self) -> tuple[str, str, str]:
        fwd, bwd, grad = (self.choices[role].kernel for role in ROLES)
        return fwd, bwd, grad


def place(kind: str, op: str, spec: LayerSpec, device: str, lengths: Lengths | None = None) -> Placed | str:
    """How the GEMMs of a site run, or why none of them can. Of a convolution's geometry only matters whether it is
    transposed. `lengths`: of their sums, where they are known."""
    geometry = (_TRANSPOSED if "transpose" in op else _PLAIN) if kind == "conv" else None
    refused = refused_roles(kind, geometry, op, spec_as_stored(kind, geometry, spec), device, lengths)
    if isinstance(refused, str):
        return refused
    running = without(spec_as_stored(kind, geometry, spec), refused)
    choices = {role: choose(GemmRequest(kind, role, running.role(role), device)) for role in ROLES}
    return Placed(running, choices | refusals(kind, refused, device))


def refusals(kind: str, refused: Mapping[Role, str], device: str) -> dict[Role, Choice]:
    """Each refused role as what runs it, with the reason."""
    found = {}
    for role, reason in refused.items():
        torchs = choose(GemmRequest(kind, role, GemmSpec(), device))
        found[role] = replace(torchs, fidelity="refused", reason=reason)
    return found


def refused_roles(
    kind: str, geometry: ConvGeometry | None, op: str, spec: LayerSpec, device: str, lengths: Lengths | None = None
) -> dict[Role, str] | str:
    """The roles of a GEMM that nothing runs as `spec`, which is for the operands as stored, says, with the reason; or
    why nothing of it can be run so.
    """
    refused: dict[Role, str] = {}
    for role in ROLES:
        if spec.role(role).accumulator.is_open:
            return f"{role}: no accumulator was chosen; run choose-accumulator first"
        if reason := _why_refused(kind, geometry, op, role, spec.role(role), device, (lengths or {}).get(role)):
            refused[role] = reason
    running = without(spec, refused)
    if refused and running.is_identity:
        return next(iter(refused.values()))
    return _why_not_learned(spec) or _why_not_learned(running) or refused


def _why_refused(
    kind: str, geometry: ConvGeometry | None, op: str, role: Role, numbers: GemmSpec, device: str, length: int | None
) -> str:
    contraction = contraction_of(kind, geometry)
    operands: tuple[tuple[Side, QuantSpec], ...] = (("lhs", numbers.lhs), ("rhs", numbers.rhs))
    if numbers.lhs.transform != numbers.rhs.transform:
        said = (f"{slot_name(contraction, role, side)} has {each.transform or 'none'}" for side, each in operands)
        return f"{role}: a transform leaves a sum whose both operands have it, and {', '.join(said)}; use one on both"
    for side, operand in operands:
        if operand.transform is not None and kind == "conv":
            name = slot_name(contraction, role, side)
            what = f"{operand.transform} turns an operand along one axis, and the sum of a {op} has several"
            return f"{role} {name}: {what}; use no transform"
        if operand.is_block and kind == "conv":
            name = slot_name(contraction, role, side)
            what = f"blocks of {operand.format} lie along one axis, and the sum of a {op} has several"
            return f"{role} {name}: {what}; use a scalar format such as e4m3, with a scale of granularity tensor"
        if reason := why_not_scaled(contraction, op, role, side, numbers):
            return f"{role} {reason}"
    if reason := why_no_room(role, numbers, length):
        return reason
    try:
        choose(GemmRequest(kind, role, numbers, device))
    except NotSupported as error:
        return str(error)
    return ""


def _why_not_learned(spec: LayerSpec) -> str:
    """Why a quantizer with state has no gradient to learn by; "" if each has, or there is none."""
    for role, side, forward in (("bwd", "rhs", spec.fwd.rhs), ("grad", "rhs", spec.fwd.lhs)):
        operand = getattr(spec.role(role), side)  # type: ignore[arg-type]
        if operand.quantizer is not None and operand.quantizer.learns and operand != forward:
            return f"{role} {side}: {operand} learns by what FWD casts, {forward}; use one cast in both, or none here"
    for role in ("bwd", "grad"):
        operand = spec.role(role).lhs  # type: ignore[arg-type]
        if operand.quantizer is not None and operand.quantizer.learns:
            return f"{role} lhs: {operand.quantizer.kind} learns by a gradient, and the cast of one has none"
    return ""


_PLAIN, _TRANSPOSED = ConvGeometry((1,), (0,), (1,)), ConvGeometry((1,), (0,), (1,), output_padding=(0,))
