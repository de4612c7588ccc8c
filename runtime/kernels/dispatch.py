"""Dispatch: which backend runs a GEMM, and how exactly. Backends are asked in order of preference; each accepts or
declines with a reason.

Fidelity of an accepted GEMM:

    bitwise       equal to the reference, bit for bit
    format-exact  operands embed, same accumulator and output format; only the order of additions differs (bound in
                  the reason)
    bounded       a stated cause makes it differ by a stated bound
    emulated      runs in the emulation kernel, which rounds after every add
    refused       runs as the uncompiled model does; the reason says why
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from runtime.errors import NotSupported
from runtime.kernels import cuda, torch_native
from runtime.kernels.cpu import accumulate as cpu_accumulate
from runtime.kernels.cpu import gemm as cpu_gemm
from runtime.numerics import reference_gemm as reference
from runtime.numerics.block_formats import grid_format
from runtime.numerics.formats import FloatFormat, embeds, get_format
from runtime.numerics.free_axes import FREE_AXES, Side
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import FP32_SUMS, IDENTITY, SCALE_RULES, AccumulateSpec, GemmSpec, QuantSpec, Role

Fidelity = Literal["bitwise", "format-exact", "bounded", "emulated", "refused"]


@dataclass(frozen=True)
class GemmRequest:
    """One GEMM to place: the layer kind (of FREE_AXES), the role, the numbers and the device type."""

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
    if _is_int8(request) and cpu_gemm.int8_library():
        return Choice(name, "cpu_int8", "bitwise", "int8 products add exactly in int32, on AMX tiles")
    if spec.accumulator != FP32_SUMS:
        return Declined(name, f"it sums in fp32, not {_sum_of(spec)}")
    if not (embeds(lhs, "bf16") and embeds(rhs, "bf16")):
        return Declined(name, f"{spec.lhs.format} x {spec.rhs.format} does not embed in bf16")
    if _leaves_grid(request):
        return Declined(name, f"{_FOLDED}, which leave bf16")
    if spec.out == "bf16":
        return Declined(name, "torch's own bf16 GEMM has this output")
    if cpu_gemm.gemm_library() is None:
        return Declined(name, "no C++ compiler, or a CPU without AVX512-BF16")
    how = f"{spec.lhs.format} and {spec.rhs.format} embed in bf16, fp32 sums; {_ORDER_BOUND}"
    if _can_underflow(spec):
        return Choice(name, "cpu_bf16", "bounded", f"{how}; operands, products and sums below 2^-126 count as 0")
    return Choice(name, "cpu_bf16", "format-exact", how)


def _consider_cuda(request: GemmRequest) -> Choice | Declined:
    """The narrowest matrix unit that holds both operands, with fp32 results, for the matrices of linear layers."""
    name, spec, device = cuda.NAME, request.spec, cuda.current_capability()
    lhs, rhs = grid_format(spec.lhs.format), grid_format(spec.rhs.format)
    if device is None:
        return Declined(name, "no CUDA device is here")
    if spec.is_identity or request.kind not in ("linear", "linear_kn"):
        return Declined(name, f"torch's own {request.kind} runs it")
    casts = "" if device.has_triton else "; casts are torch ops: triton is not installed"
    if _is_int8(request) and device.has_int8:
        return Choice(name, "cuda_int8", "bitwise", f"int8 products add exactly in int32{casts}")
    if spec.accumulator != FP32_SUMS:
        return Declined(name, f"it sums in fp32, not {_sum_of(spec)}")
    operands, folds = f"{spec.lhs.format} x {spec.rhs.format}", _folds(request)
    if _leaves_grid(request):
        return Declined(name, f"{_FOLDED}, which leave the units' formats")
    containers = cuda.fp8_containers(lhs, rhs)
    if containers and device.has_fp8 and not folds:
        held = " x ".join(f"{c.name} shifted by 2^{c.shift}" if c.shift else c.name for c in containers)
        return Choice(name, "cuda_fp8", "bounded", f"{operands} embeds in {held}; {device.fp8_sum}{casts}")
    why = "no FP8 pair holds " + operands if not containers else f"{device.device} has no FP8 units"
    if containers and device.has_fp8:
        why = "a power-of-two scale that varies along the sum is multiplied into the values, which leave FP8"
    units = (("bf16", device.has_bf16, False), ("fp16", device.has_fp16, folds))
    unit = next((u for u, is_here, leaves in units if is_here and not leaves and embeds(lhs, u) and embeds(rhs, u)), "")
    if not unit:
        return Declined(name, f"{why}; {device.device} has no unit that holds both operands")
    if spec.out == "bf16" == unit:
        return Declined(name, f"{why}; torch's own bf16 GEMM has this output")
    if not device.has_mm_out_dtype:
        return Declined(name, f"{why}; this torch rounds {unit} sums to {unit}: its mm has no out_dtype")
    bound = cuda.product_bound(23)
    return Choice(name, f"cuda_{unit}", "bounded", f"{why}; both embed in {unit}, whose unit cuts sums, {bound}{casts}")


def _consider_cpu_emulation(request: GemmRequest) -> Choice | Declined:
    """The C++ kernel that rounds after every multiply-add."""
    spec = request.spec
    if request.device != "cpu":
        return Declined("cpu_emulation", f"it does not run on {request.device}")
    if reason := cpu_accumulate.declines(spec):
        return Declined("cpu_emulation", reason)
    how = f"rounds to {_sum_of(spec)} after every {_unit_of(spec)}, bitwise the reference"
    method = "cpu_accumulate_off_grid" if _folds(request) else "cpu_accumulate"
    return Choice("cpu_emulation", method, "emulated", how)


def _folds(request: GemmRequest, rules: tuple[str, ...] = SCALE_RULES) -> bool:
    """Whether a scale of one of these rules varies along the sum, and is then multiplied into its operand's values."""
    operands: tuple[tuple[Side, QuantSpec], ...] = (("lhs", request.spec.lhs), ("rhs", request.spec.rhs))
    for side, operand in operands:
        free = ("tensor", FREE_AXES[request.kind][request.role, side])
        if operand.scale is not None and operand.scale.granularity not in free and operand.scale.rule in rules:
            return True
    return False


def _leaves_grid(request: GemmRequest) -> bool:
    """Whether an operand's values are rounded to fp32 once more, by a scale in the sum that is no power of two."""
    return _folds(request, ("amax",))


def _is_int8(request: GemmRequest) -> bool:
    """Whether int8 matrices are multiplied into int32 sums."""
    spec = request.spec
    return spec.accumulator == _INT32 and spec.lhs.format == spec.rhs.format == "int8" and not _folds(request)


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
        if _folds(request):
            return Declined(name, "a scale inside the sum leaves the integers")
        if request.kind not in ("linear", "linear_kn") or request.device != "cpu":
            return Declined(name, f"torch has no int8 {request.kind} of any size on {request.device}")
        return Choice(name, "int8", "bitwise", "int8 products add exactly in int32")
    if spec.accumulator != FP32_SUMS:
        return Declined(name, f"hardware sums in fp32, not {_sum_of(spec)}")
    bf16, fp32 = get_format("bf16"), get_format("fp32")
    on_cuda = request.device == "cuda"
    if spec.out == "bf16" and embeds(lhs, bf16) and embeds(rhs, bf16) and not _leaves_grid(request):
        return Choice(
            name,
            "bf16",
            "bounded",
            "bf16 GEMM, fp32 sums rounded once to bf16"
            + (", parts of a sum too where torch splits K (allow_bf16_reduced_precision_reduction)" if on_cuda else "")
            + f"; subnormal bf16 operands may count as 0; {_ORDER_BOUND}",
        )
    if on_cuda and (device := cuda.current_capability()) and device.allows_tf32[request.kind == "conv"]:
        if not (embeds(lhs, "tf32") and embeds(rhs, "tf32")):
            return Declined(name, "torch may round fp32 operands to tf32: torch.backends has allow_tf32 set")
        how = f"{spec.lhs.format} and {spec.rhs.format} embed in tf32, which torch may use and whose unit cuts sums"
        return Choice(name, "fp32", "bounded", f"{how}, {cuda.product_bound(23)}")
    if embeds(lhs, fp32) and embeds(rhs, fp32) and _leaves_grid(request):
        how = f"{_FOLDED}, each rounded once to fp32: 2^-24 of it; {_ORDER_BOUND}"
        return Choice(name, "fp32", "bounded", how)
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
_FOLDED = "a scale inside the sum is multiplied into the values"
_ORDER_BOUND = "order of additions differs, |error| <= (K-1) 2^-24 sum|a b|"

BACKENDS: tuple[Callable[[GemmRequest], Choice | Declined], ...] = (
    _consider_cpu,
    _consider_torch,
    _consider_cpu_emulation,
    _consider_reference,
)


EMULATED = ("cpu_accumulate", "cpu_accumulate_off_grid", "sequential")
"""Methods that round as they add, in the order that runtime/numerics/reference_gemm.py defines."""


def multiplier(method: str, spec: GemmSpec, key: RandomKey = NO_KEY) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of two matrices of grid values by `method` of a Choice: a of `spec.lhs`, b of `spec.rhs`; `key` is
    for stochastic sums.
    """
    if method == "cpu_accumulate":
        return lambda a, b: cpu_accumulate.multiply(a, b, spec, key)
    if method == "cpu_accumulate_off_grid":
        off_grid = replace(spec, lhs=IDENTITY, rhs=IDENTITY)
        return lambda a, b: cpu_accumulate.multiply(a, b, off_grid, key)
    if method == "cpu_bf16":
        return cpu_gemm.multiply
    if method == "cpu_int8":
        return _keeping_nan(cpu_gemm.multiply_int8)
    if method == "cuda_fp8":
        containers = cuda.fp8_containers(grid_format(spec.lhs.format), grid_format(spec.rhs.format))
        assert containers is not None
        return lambda a, b: cuda.multiply_fp8(a, b, containers)
    if method in ("cuda_bf16", "cuda_fp16"):
        return cuda.multiply_half
    if method == "cuda_int8":
        return _keeping_nan(cuda.multiply_int8)
    if method == "sequential":
        return lambda a, b: reference.multiply(a, b, spec, key)
    return _keeping_nan(torch_native.multiply) if method == "int8" else torch_native.multiply


def _keeping_nan(multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """An int8 product whose operand may be in fp32 instead, because it holds a NaN: what that reaches is NaN."""

    def run(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype == b.dtype == torch.int8:
            return multiply(a, b)
        is_nan = a.isnan().any(-1, keepdim=True) | b.isnan().any(-2, keepdim=True)
        a, b = (x.nan_to_num(0.0).to(torch.int8) for x in (a, b))
        return multiply(a, b).masked_fill(is_nan, torch.nan)

    return run
