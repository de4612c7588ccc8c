"""Dispatch: which backend runs a GEMM, and how exactly. Backends are asked in order of preference; each accepts or
declines with a reason.

Fidelity of an accepted GEMM:

    bitwise       equal to the reference, bit for bit format-exact  operands embed, same accumulator and output format;
    only the order of additions differs (bound in the reason) bounded       a stated cause makes it differ by a stated
    bound emulated      runs in the emulation kernel, which rounds after every add refused       runs as the uncompiled
    model does; the reason says why
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from runtime.errors import NotSupported
from runtime.kernels import reference, torch_native
from runtime.kernels.cpu import accumulate as cpu_accumulate
from runtime.kernels.cpu import gemm as cpu_gemm
from runtime.numerics.block_formats import grid_format
from runtime.numerics.formats import FloatFormat, embeds, get_format
from runtime.numerics.specs import GemmSpec, Role

Fidelity = Literal["bitwise", "format-exact", "bounded", "emulated", "refused"]


@dataclass(frozen=True)
class GemmRequest:
    """One GEMM to place: the layer kind (a name of runtime.gemms.KINDS), the role, the numbers and the device type."""

    kind: str
    role: Role
    spec: GemmSpec
    device: str = "cpu"


@dataclass(frozen=True)
class Choice:
    """A backend that accepted: `method` names how it runs (a row of the backend's table)."""

    backend: str
    method: str
    fidelity: Fidelity
    reason: str


@dataclass(frozen=True)
class Declined:
    """A backend that did not accept, and why. Falsy, so that `a or b` reads as preference."""

    backend: str
    reason: str

    def __bool__(self) -> bool:
        return False


def choose(request: GemmRequest) -> Choice:
    """The first backend of BACKENDS that accepts. Raises NotSupported, naming every reason, when none does."""
    declined: list[Declined] = []
    for consider in BACKENDS:
        answer = consider(request)
        if isinstance(answer, Choice):
            notes = "".join(f"; {other.backend} declined: {other.reason}" for other in declined)
            return Choice(answer.backend, answer.method, answer.fidelity, answer.reason + notes)
        declined.append(answer)
    reasons = "; ".join(f"{other.backend}: {other.reason}" for other in declined)
    raise NotSupported(f"no backend runs {request.kind} {request.role} as `{request.spec}`", got=reasons)


def _consider_cpu(request: GemmRequest) -> Choice | Declined:
    """The C++ GEMM: bf16 units, and unlike torch's a result in fp32."""
    name, spec = cpu_gemm.NAME, request.spec
    lhs, rhs = grid_format(spec.lhs.format), grid_format(spec.rhs.format)
    if request.device != "cpu" or request.kind not in ("linear", "linear_kn"):
        return Declined(name, f"it has no {request.kind} on {request.device}")
    if spec.accumulate == "int32" and spec.lhs.format == spec.rhs.format == "int8" and cpu_gemm.int8_library():
        return Choice(name, "cpu_int8", "bitwise", "int8 products add exactly in int32, on AMX tiles")
    if spec.accumulate != "fp32" or spec.chunk is not None:
        return Declined(name, f"it sums in fp32, not {_sum_of(spec)}")
    if not (embeds(lhs, "bf16") and embeds(rhs, "bf16")):
        return Declined(name, f"{spec.lhs.format} x {spec.rhs.format} does not embed in bf16")
    if spec.out == "bf16":
        return Declined(name, "torch's own bf16 GEMM has this output")
    if cpu_gemm.gemm_library() is None:
        return Declined(name, "no C++ compiler, or a CPU without AVX512-BF16")
    how = f"{spec.lhs.format} and {spec.rhs.format} embed in bf16, fp32 sums; {_ORDER_BOUND}"
    if _can_underflow(spec):
        return Choice(name, "cpu_bf16", "bounded", f"{how}; operands, products and sums below 2^-126 count as 0")
    return Choice(name, "cpu_bf16", "format-exact", how)


def _consider_cpu_emulation(request: GemmRequest) -> Choice | Declined:
    """The C++ kernel that rounds after every multiply-add."""
    spec = request.spec
    if request.device != "cpu" or request.kind == "conv":
        return Declined("cpu_emulation", f"it has no {request.kind} on {request.device}")
    if reason := cpu_accumulate.declines(spec):
        return Declined("cpu_emulation", reason)
    how = f"rounds to {_sum_of(spec)} after every add, bitwise the reference"
    return Choice("cpu_emulation", "cpu_accumulate", "emulated", how)


def _can_underflow(spec: GemmSpec) -> bool:
    """Whether a product of two operands can leave fp32's normal range, which the bf16 unit flushes to zero."""
    for operand in (spec.lhs, spec.rhs):
        row = grid_format(operand.format)
        is_folded = operand.scale is not None and operand.scale.rule == "pow2"
        if is_folded or (isinstance(row, FloatFormat) and row.tiny < 2.0**-63):
            return True
    return False


def _sum_of(spec: GemmSpec) -> str:
    return spec.accumulate + (f" in chunks of {spec.chunk}" if spec.chunk else "")


def _consider_torch(request: GemmRequest) -> Choice | Declined:
    name, spec = torch_native.NAME, request.spec
    lhs, rhs = grid_format(spec.lhs.format), grid_format(spec.rhs.format)
    if spec.is_identity:
        return Choice(name, "as_is", "format-exact", f"no operand is cast; {_ORDER_BOUND}")
    if spec.accumulate == "int32":
        if spec.lhs.format != "int8" or spec.rhs.format != "int8":
            return Declined(name, f"int32 sums need int8 operands, not {spec.lhs.format} x {spec.rhs.format}")
        if request.kind not in ("linear", "linear_kn"):
            return Declined(name, f"torch has no int8 {request.kind}")
        return Choice(name, "int8", "bitwise", "int8 products add exactly in int32")
    if spec.accumulate != "fp32" or spec.chunk is not None:
        return Declined(name, f"hardware sums in fp32, not {_sum_of(spec)}")
    bf16, fp32 = get_format("bf16"), get_format("fp32")
    if spec.out == "bf16" and embeds(lhs, bf16) and embeds(rhs, bf16):
        return Choice(
            name,
            "bf16",
            "bounded",
            f"bf16 GEMM, fp32 sums rounded once to bf16; subnormal bf16 operands may count as 0; {_ORDER_BOUND}",
        )
    if embeds(lhs, fp32) and embeds(rhs, fp32):
        return Choice(
            name, "fp32", "format-exact", f"{spec.lhs.format} and {spec.rhs.format} embed in fp32; {_ORDER_BOUND}"
        )
    return Declined(name, f"{spec.lhs.format} x {spec.rhs.format} does not embed in fp32")


def _consider_reference(request: GemmRequest) -> Choice | Declined:
    spec = request.spec
    if request.kind == "conv":
        return Declined(reference.NAME, "it has no convolution")
    if not isinstance(get_format(spec.accumulate), FloatFormat):
        return Declined(reference.NAME, f"it sums in floats, not in {spec.accumulate}")
    return Choice(reference.NAME, "sequential", "emulated", f"rounds to {spec.accumulate} after every add")


_ORDER_BOUND = "order of additions differs, |error| <= (K-1) 2^-24 sum|a b|"

BACKENDS: tuple[Callable[[GemmRequest], Choice | Declined], ...] = (
    _consider_cpu,
    _consider_torch,
    _consider_cpu_emulation,
    _consider_reference,
)


def multiplier(method: str, spec: GemmSpec) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of two matrices of grid values by `method` of a Choice."""
    if method == "cpu_accumulate":
        return lambda a, b: cpu_accumulate.multiply(a, b, spec)
    if method == "cpu_bf16":
        return cpu_gemm.multiply
    if method == "cpu_int8":
        return cpu_gemm.multiply_int8
    if method == "sequential":
        return lambda a, b: reference.multiply(a, b, spec)
    return torch_native.multiply
