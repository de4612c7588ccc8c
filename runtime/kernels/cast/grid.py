"""Casts to grid values: those of runtime/numerics/casts.py, bit for bit, at the speed of memory, as torch ops.

    lp::to_grid            x / s on the grid of a cast, in the dtype asked for
    lp::to_grid_checked    the same, and what a caller must know of it: SAID_OVERFLOW, SAID_NARROW

The C++ kernel serves fp32, bf16 and fp16 tensors on the CPU (a strided one is copied first), every format within
fp32's normal exponents, tables of up to 62 values, block formats, every rounding, every granularity of scale. All else
takes the oracle, and so does a machine without a compiler. On CUDA Triton kernels serve the same dtypes and scales,
block formats and every format with a `cast_plan`; tables take the oracle there. Nothing here waits for a CUDA device.
"""

from functools import partial

import torch
from torch import Tensor

from runtime.kernels.cast.traced import Draw, is_traced, traced_to_grid
from runtime.kernels.cast_plans import block_plan, cast_plan, corrected_plan, table_plan
from runtime.kernels.cpu.block_cast import fast_blocks
from runtime.kernels.cpu.cast_library import CastPlan, TablePlan, cast_library, is_readable, run_cast
from runtime.kernels.cpu.contiguous import contiguous
from runtime.kernels.cpu.philox import random_plan
from runtime.kernels.fake import has_values
from runtime.kernels.torch_ops import declare
from runtime.kernels.triton import is_readable_by_triton
from runtime.numerics.block_formats import get_block_format
from runtime.numerics.casts import to_grid
from runtime.numerics.formats import get_format
from runtime.numerics.random import check_counter, signed_seed
from runtime.numerics.range_casts import values_in_range
from runtime.numerics.range_formats import get_range_format
from runtime.numerics.scaling import expand_scale, matrix_shape, tile_shape
from runtime.numerics.specs import QuantSpec, ScaleSpec

SAID_OVERFLOW, SAID_NARROW = 1, 2
"""Bits of what lp::to_grid_checked says: an element overflowed or is no number; the dtype does not hold every value."""


def fast_to_grid(
    x: Tensor, spec: QuantSpec, scale: Tensor | None, *, dtype: torch.dtype = torch.float32,
    seed: int = 0, step: int = 0, stream: int = 0, offset: int = 0,
) -> Tensor:  # fmt: skip
    """`casts.to_grid`, same values, contiguous, held in `dtype`; x itself for the identity spec.

    float32 (the default) is float64 for float64 x. What `dtype` may not have is seen by looking: bfloat16 becomes
    float32 for a block cast with values below its range, and int8 float32 where x holds a NaN. Where values cannot be
    looked at (compiled, traced and fake tensors) it is `roomy_dtype`. Nothing waits for CUDA: there a block cast is
    float32, and int8 loses a NaN in eager code.
    """
    if spec.is_identity:
        return x
    draw = Draw(seed, step, stream, offset)
    if torch.compiler.is_compiling():
        return _traced(x, spec, scale, roomy_dtype(spec, dtype), draw)
    call, draws = (x.detach(), scale, spec.text), (signed_seed(seed), step, stream, offset)
    if dtype == torch.int8 or (spec.is_block and dtype == torch.bfloat16):
        if x.is_cuda or not has_values(x):
            dtype = dtype if x.is_cuda and not spec.is_block else roomy_dtype(spec, dtype)
        else:
            grid, said = torch.ops.lp.to_grid_checked.default(*call, dtype, *draws)
            if not int(said) & SAID_NARROW:
                return grid
            dtype = torch.float32
    values: Tensor = torch.ops.lp.to_grid.default(*call, dtype, *draws)
    return values


def fast_to_grid_checked(
    x: Tensor, spec: QuantSpec, scale: Tensor | None, *, dtype: torch.dtype = torch.float32,
    seed: int = 0, step: int = 0, stream: int = 0, offset: int = 0,
) -> tuple[Tensor, Tensor | bool]:  # fmt: skip
    """`fast_to_grid` and whether any element overflowed, bool (): |x / scale| non-finite, or above max once rounded.

    Once rounded, as IEEE 754 defines overflow: under an amax scale the largest element is max (1 +- 2^-23) before
    rounding and would count as overflow half of the time. For the identity spec, and for a block spec, which scales
    every block into range: whether x holds an Inf or NaN.
    """
    if spec.is_identity:
        return x, _has_nonfinite(x)
    call, draws = (x.detach(), scale, spec.text), (signed_seed(seed), step, stream, offset)
    is_seen = has_values(x) and not x.is_cuda
    if not is_seen and (spec.is_block or not x.is_cuda):
        dtype = roomy_dtype(spec, dtype)
    grid, said = torch.ops.lp.to_grid_checked.default(*call, dtype, *draws)
    if not is_seen:
        return grid, said & SAID_OVERFLOW != 0
    bits = int(said)
    if bits & SAID_NARROW:
        grid = torch.ops.lp.to_grid.default(*call, torch.float32, *draws)
    return grid, bool(bits & SAID_OVERFLOW)


def roomy_dtype(spec: QuantSpec, dtype: torch.dtype) -> torch.dtype:
    """What holds all that a cast may give, where `dtype` is what holds all that it mostly gives: int8 has no NaN, and
    values of blocks may be too small for bfloat16.
    """
    if spec.is_block:
        return torch.float32
    return torch.bfloat16 if dtype == torch.int8 else dtype


def _traced(x: Tensor, spec: QuantSpec, scale: Tensor | None, dtype: torch.dtype, draw: Draw) -> Tensor:
    """The cast in code that is compiled: operations that fuse, or one opaque op."""
    if not spec.is_elementwise or not is_traced(x, spec.format, spec.rounding):
        result: Tensor = torch.ops.lp.to_grid(x, scale, spec.text, dtype, signed_seed(draw.seed), *draw[1:])
        return result
    divisor = None if scale is None else expand_scale(scale, x.shape, spec)
    return traced_to_grid(x, spec.format, spec.rounding, divisor).to(dtype)


def _has_nonfinite(x: Tensor) -> Tensor:
    if not x.numel():
        return torch.zeros((), dtype=torch.bool, device=x.device)
    return ~torch.stack(torch.aminmax(x)).isfinite().all()


def _to_grid(
    x: Tensor, s: Tensor | None, spec: str, dtype: torch.dtype, seed: int, step: int, stream: int, offset: int
) -> Tensor:
    return _cast(x, s, QuantSpec.parse(spec), dtype, Draw(seed, step, stream, offset), is_checked=False)[0]


def _to_grid_checked(
    x: Tensor, s: Tensor | None, spec: str, dtype: torch.dtype, seed: int, step: int, stream: int, offset: int
) -> tuple[Tensor, Tensor]:
    grid, said = _cast(x, s, QuantSpec.parse(spec), dtype, Draw(seed, step, stream, offset), is_checked=True)
    return grid, torch.tensor(said, dtype=torch.uint8, device="cpu") if isinstance(said, int) else said


def _cast(
    x: Tensor, scale: Tensor | None, spec: QuantSpec, dtype: torch.dtype, draw: Draw, *, is_checked: bool
) -> tuple[Tensor, Tensor | int]:
    """A new contiguous tensor and what is said of it; 0 where nobody asked."""
    if spec.rounding == "stochastic":
        check_counter(*draw[1:])
    if spec.is_identity:
        return x.clone(memory_format=torch.contiguous_format), 0
    if spec.is_block:
        return _cast_blocks(x, spec, dtype, draw, is_checked=is_checked)
    if spec.is_range:
        return _cast_to_range(x, spec, draw)
    if not _is_served(x, spec, scale):
        return _cast_by_oracle(x, scale, spec, dtype, draw, is_checked=is_checked)
    tile = tile_shape(x.shape, spec.scale or _WHOLE)
    if x.is_cuda:
        from runtime.kernels.triton.cast import launch_cast  # imports triton

        plan = cast_plan(spec.format, spec.rounding)
        assert plan is not None
        grid, is_beyond = launch_cast(
            x.contiguous(), scale, plan, dtype, tile, draw if spec.rounding == "stochastic" else None
        )
        return grid, is_beyond.to(torch.uint8)
    out, cpu_plan = torch.empty(x.shape, dtype=dtype, device="cpu"), _plan(spec)
    assert cpu_plan is not None
    random = random_plan(*draw) if spec.rounding == "stochastic" else None
    said = int(run_cast(cpu_plan, x, out, scale, tile, random))
    if said and is_checked and dtype == torch.int8 and bool(x.isnan().any()):
        said |= SAID_NARROW
    return out, said


def _cast_to_range(x: Tensor, spec: QuantSpec, draw: Draw) -> tuple[Tensor, Tensor]:
    def cast(y: Tensor, integers: QuantSpec, s: Tensor) -> Tensor:
        return fast_to_grid(y, integers, s, **draw._asdict())

    values = values_in_range(x, get_range_format(spec.format), spec.rounding, cast)
    return values, _has_nonfinite(values).to(torch.uint8) * SAID_OVERFLOW


def _cast_by_oracle(
    x: Tensor, scale: Tensor | None, spec: QuantSpec, dtype: torch.dtype, draw: Draw, *, is_checked: bool
) -> tuple[Tensor, Tensor | int]:
    cast = partial(to_grid, contiguous(x), spec, scale, **draw._asdict())
    grid = cast().contiguous()
    held = _held(grid, dtype)
    if not is_checked:
        return held, 0
    row, unbounded = get_format(spec.format), cast(overflow="unbounded")
    said = ~((unbounded >= row.min) & (unbounded <= row.max)).all()
    if dtype == torch.int8:
        said = said | SAID_NARROW * grid.isnan().any()
    return held, said.to(torch.uint8)


def _held(grid: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, with its signs: what torch makes of a NaN in bfloat16 is negative on some CPUs."""
    if dtype == torch.float32:
        return grid
    held = grid.to(dtype)
    return held.copysign(torch.where(grid.signbit(), -1.0, 1.0).to(dtype)) if dtype.is_floating_point else held


def _cast_blocks(
    x: Tensor, spec: QuantSpec, dtype: torch.dtype, draw: Draw, *, is_checked: bool
) -> tuple[Tensor, Tensor]:
    is_stochastic, is_column = spec.rounding == "stochastic", spec.along in ("column", "batched-column")
    matrix = x.reshape(matrix_shape(x.shape)) if spec.along == "column" else x
    row = get_block_format(spec.format)
    fast = fast_blocks(
        matrix, row, block_plan(row, spec.rounding), is_divided=False, is_column=is_column,
        is_stochastic=is_stochastic, dtype=dtype, corrected=corrected_plan(row, spec.rounding), **draw._asdict(),
    )  # fmt: skip
    if fast is not None:
        return fast.values.view(x.shape), fast.said if dtype == torch.bfloat16 else fast.said & SAID_OVERFLOW
    grid = to_grid(x, spec, None, **draw._asdict()).contiguous()
    held = _held(grid, dtype)
    is_bad = grid.isnan()
    said = is_bad.any() * SAID_OVERFLOW
    return held, (said | SAID_NARROW * ~((held == grid) | is_bad).all() if is_checked else said).to(torch.uint8)


def _plan(spec: QuantSpec) -> CastPlan | TablePlan | None:
    return cast_plan(spec.format, spec.rounding) or table_plan(spec.format, spec.rounding)


def _is_served(x: Tensor, spec: QuantSpec, scale: Tensor | None) -> bool:
    """Whether the C++ kernel takes this cast or, on CUDA, the Triton kernel."""
    if not (is_readable(x) or _is_readable_on_cuda(x, spec)) or _plan(spec) is None:
        return False
    if scale is not None:
        if spec.scale is None or scale.dtype != torch.float32 or scale.device != x.device or not scale.is_contiguous():
            return False
        (rows, columns), (m, k) = tile_shape(x.shape, spec.scale), matrix_shape(x.shape)
        if scale.numel() != -(-m // rows) * -(-k // columns):
            return False
    return x.is_cuda or cast_library() is not None


def _is_readable_on_cuda(x: Tensor, spec: QuantSpec) -> bool:
    """Whether the Triton kernel can read x; it has no tables."""
    return is_readable_by_triton(x) and cast_plan(spec.format, spec.rounding) is not None


def _shape(
    x: Tensor, s: Tensor | None, spec: str, dtype: torch.dtype, seed: int, step: int, stream: int, offset: int
) -> Tensor:
    parsed = QuantSpec.parse(spec)
    if parsed.is_identity:
        dtype = x.dtype
    is_fp32 = parsed.is_block and parsed.has_scale  # what has two levels is rounded to fp32
    is_wide = x.dtype == torch.float64 and dtype == torch.float32 and not is_fp32
    return torch.empty(x.shape, dtype=torch.float64 if is_wide else dtype, device=x.device)


def _checked_shape(
    x: Tensor, s: Tensor | None, spec: str, dtype: torch.dtype, seed: int, step: int, stream: int, offset: int
) -> tuple[Tensor, Tensor]:
    return _shape(x, s, spec, dtype, seed, step, stream, offset), x.new_empty((), dtype=torch.uint8)


_WHOLE = ScaleSpec()
_CAST = "(Tensor x, Tensor? s, str spec, ScalarType dtype, SymInt seed, SymInt step, SymInt stream, SymInt offset)"
declare(f"to_grid{_CAST} -> Tensor", _to_grid, fake=_shape)
declare(f"to_grid_checked{_CAST} -> (Tensor, Tensor)", _to_grid_checked, fake=_checked_shape)
