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
from runtime.kernels import cuda, reference, torch_native
from runtime.kernels.cpu import accumulate as cpu_accumulate
from runtime.kernels.cpu import gemm as cpu_gemm
from runtime.kernels.reference import NO_KEY, RandomKey
from runtime.numerics.block_formats import grid_format
from runtime.numerics.formats import FloatFormat, embeds, get_format
from runtime.numerics.specs import FP32_SUMS, AccumulateSpec, GemmSpec, Role

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
    for consider in (_consider_cuda, *BACKENDS) if request.device == "cuda" else BACKENDS:
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
    if spec.accumulator == _INT32 and spec.lhs.format == spec.rhs.format == "int8" and cpu_gemm.int8_library():
        return Choice(name, "cpu_int8", "bitwise", "int8 products add exactly in int32, on AMX tiles")
    if spec.accumulator != FP32_SUMS:
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


def _consider_cuda(request: GemmRequest) -> Choice | Declined:
    """FP8 or bf16 units with fp32 results, for the matrices of linear layers."""
    name, spec, device = cuda.NAME, request.spec, cuda.current_capability()
    lhs, rhs = grid_format(spec.lhs.format), grid_format(spec.rhs.format)
    operands = f"{spec.lhs.format} and {spec.rhs.format}"
    if device is None:
        return Declined(name, "no CUDA device is here")
    if spec.is_identity or request.kind not in ("linear", "linear_kn"):
        return Declined(name, f"torch's own {request.kind} runs it")
    if spec.accumulator != FP32_SUMS or spec.out != "fp32":
        return Declined(name, f"it sums in fp32 to fp32, not in {_sum_of(spec)} to {spec.out}")
    if not (embeds(lhs, "bf16") and embeds(rhs, "bf16")):
        return Declined(name, f"{operands} do not embed in bf16")
    if not device.has_bf16:
        return Declined(name, f"{device.device} has no bf16 units")
    if not device.has_fp8:
        why = f"{device.device} has no FP8 units"
    elif not (embeds(lhs, "e4m3") and embeds(rhs, "e4m3")):
        why = f"{operands} do not embed in e4m3"
    elif _may_fold(spec):
        why = "a power-of-two scale that varies along the sum is multiplied into the values, which leave e4m3"
    elif device.is_short_sum:
        short = f"{device.device} adds FP8 products in about 14 bits, |error| <= (K-1) 2^-13 sum|a b|"
        return Choice(name, "cuda_fp8", "bounded", f"{operands} embed in e4m3; {short}")
    else:
        return Choice(name, "cuda_fp8", "format-exact", f"{operands} embed in e4m3, fp32 sums; {_ORDER_BOUND}")
    fidelity: Fidelity = "bounded" if _can_underflow(spec) else "format-exact"
    return Choice(name, "cuda_bf16", fidelity, f"{why}; both embed in bf16, fp32 sums; {_ORDER_BOUND}")


def _consider_cpu_emulation(request: GemmRequest) -> Choice | Declined:
    """The C++ kernel that rounds after every multiply-add."""
    spec = request.spec
    if request.device != "cpu":
        return Declined("cpu_emulation", f"it does not run on {request.device}")
    if reason := cpu_accumulate.declines(spec):
        return Declined("cpu_emulation", reason)
    how = f"rounds to {_sum_of(spec)} after every {_unit_of(spec)}, bitwise the reference"
    return Choice("cpu_emulation", "cpu_accumulate", "emulated", how)


def _may_fold(spec: GemmSpec) -> bool:
    """Whether an operand has a scale that can vary along the sum, and is then multiplied into its grid values."""
    scales = (spec.lhs.scale, spec.rhs.scale)
    return any(scale and scale.rule == "pow2" and scale.granularity != "tensor" for scale in scales)


def _can_underflow(spec: GemmSpec) -> bool:
    """Whether a product of two operands can leave fp32's normal range, which the bf16 unit flushes to zero."""
    for operand in (spec.lhs, spec.rhs):
        row = grid_format(operand.format)
        is_folded = operand.scale is not None and operand.scale.rule == "pow2"
        if is_folded or (isinstance(row, FloatFormat) and row.tiny < 2.0**-63):
            return True
    return False


def _sum_of(spec: GemmSpec) -> str:
    how = spec.accumulator
    words = str(how).split(" ")[1:]
    return how.format + (f" in chunks of {how.chunk}" if how.chunk else "") + (f" ({' '.join(words)})" if words else "")


def _consider_torch(request: GemmRequest) -> Choice | Declined:
    name, spec = torch_native.NAME, request.spec
    lhs, rhs = grid_format(spec.lhs.format), grid_format(spec.rhs.format)
    if spec.is_identity:
        return Choice(name, "as_is", "format-exact", f"no operand is cast; {_ORDER_BOUND}")
    if spec.accumulator == _INT32:
        if spec.lhs.format != "int8" or spec.rhs.format != "int8":
            return Declined(name, f"int32 sums need int8 operands, not {spec.lhs.format} x {spec.rhs.format}")
        if request.kind not in ("linear", "linear_kn"):
            return Declined(name, f"torch has no int8 {request.kind}")
        return Choice(name, "int8", "bitwise", "int8 products add exactly in int32")
    if spec.accumulator != FP32_SUMS:
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
    if reason := reference.declines(spec):
        return Declined(reference.NAME, reason)
    return Choice(reference.NAME, "sequential", "emulated", f"rounds to {_sum_of(spec)} after every {_unit_of(spec)}")


def _unit_of(spec: GemmSpec) -> str:
    return "chunk" if spec.accumulator.model == "per_chunk" else "add"


_INT32 = AccumulateSpec("int32")
_ORDER_BOUND = "order of additions differs, |error| <= (K-1) 2^-24 sum|a b|"

BACKENDS: tuple[Callable[[GemmRequest], Choice | Declined], ...] = (
    _consider_cpu,
    _consider_torch,
    _consider_cpu_emulation,
    _consider_reference,
)


EMULATED = ("cpu_accumulate", "sequential")
"""Methods that round as they add, in the order that runtime/kernels/reference.py defines."""


def multiplier(method: str, spec: GemmSpec, key: RandomKey = NO_KEY) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of two matrices of grid values by `method` of a Choice; `key` is for stochastic sums."""
    if method == "cpu_accumulate":
        return lambda a, b: cpu_accumulate.multiply(a, b, spec, key)
    if method == "cpu_bf16":
        return cpu_gemm.multiply
    if method == "cpu_int8":
        return cpu_gemm.multiply_int8
    if method == "cuda_fp8":
        return cuda.multiply_fp8
    if method == "cuda_bf16":
        return cuda.multiply_bf16
    if method == "sequential":
        return lambda a, b: reference.multiply(a, b, spec, key)
    return torch_native.multiply
