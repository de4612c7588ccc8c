"""Cast kernels: the grid values of runtime/numerics/casts.py, bit for bit, at the speed of memory.

The C++ kernel serves fp32, bf16 and fp16 tensors on the CPU (a strided one is copied first), every format within
fp32's normal exponents, tables of up to 62 values, block formats, every rounding, every granularity of scale. All else
takes the oracle, and so does a machine without a compiler. On CUDA Triton kernels serve the same dtypes and scales,
block formats and every format with a `cast_plan`; tables take the oracle there. Nothing here waits for a CUDA device.
"""

from functools import partial

import torch
from torch import Tensor
from torch.library import Library, register_fake

from runtime.kernels.cast.traced import Draw, is_traced, traced_to_grid
from runtime.kernels.cast_plans import block_plan, cast_plan, table_plan
from runtime.kernels.cpu.block_cast import fast_blocks
from runtime.kernels.cpu.cast_library import (
    CastPlan,
    TablePlan,
    cast_library,
    is_readable,
    run_cast,
)
from runtime.kernels.cpu.philox import random_plan
from runtime.kernels.fake import has_values
from runtime.kernels.triton import is_readable_by_triton
from runtime.numerics.block_formats import get_block_format
from runtime.numerics.casts import to_grid
from runtime.numerics.formats import get_format
from runtime.numerics.random import check_counter, signed_seed
from runtime.numerics.scaling import expand_scale, matrix_shape, tile_shape
from runtime.numerics.specs import QuantSpec, ScaleSpec


def fast_to_grid(
    x: Tensor, spec: QuantSpec, scale: Tensor | None, *, dtype: torch.dtype = torch.float32,
    seed: int = 0, step: int = 0, stream: int = 0, offset: int = 0,
) -> Tensor:  # fmt: skip
    """`casts.to_grid`, same values, held in `dtype`, which must have them all; x itself for the identity spec.

    A scalar format gives a contiguous tensor, whatever x is. float32 (the default) is float64 for float64 x. bfloat16
    is float32 for a block cast with values below its range, and for every block cast on CUDA, where only waiting for
    the device would tell. int8 is float32 where x holds a NaN; on CUDA and in compiled code, which do not look, a NaN
    is then lost.
    """
    if spec.is_identity:
        return x
    if torch.compiler.is_compiling():
        return _traced(x, spec, scale, dtype, Draw(seed, step, stream, offset))
    if spec.is_block:
        return _blocks_to_grid(x, spec, dtype, seed, step, stream, offset)[0]
    if not _is_served(x, spec, scale):
        return _held(to_grid(x.contiguous(), spec, scale, seed=seed, step=step, stream=stream, offset=offset), dtype)
    given = (x.detach().contiguous(), scale, str(spec))
    draw = (signed_seed(seed), step, stream, offset)
    out, beyond = torch.ops.lp.cast_to_grid(*given, dtype, *draw)
    return out if _has_room(out, beyond, x) else torch.ops.lp.cast_to_grid(*given, torch.float32, *draw)[0]


def _traced(x: Tensor, spec: QuantSpec, scale: Tensor | None, dtype: torch.dtype, draw: Draw) -> Tensor:
    """The cast in code that is compiled: operations that fuse, or one opaque op."""
    if spec.is_block or not is_traced(x, spec.format, spec.rounding):
        result: Tensor = torch.ops.lp.to_grid(x, scale, str(spec), dtype, signed_seed(draw.seed), *draw[1:])
        return result
    divisor = None if scale is None else expand_scale(scale, x.shape, spec)
    return traced_to_grid(x, spec.format, spec.rounding, divisor, draw).to(dtype)


def fast_to_grid_checked(
    x: Tensor, spec: QuantSpec, scale: Tensor | None, *, dtype: torch.dtype = torch.float32,
    seed: int = 0, step: int = 0, stream: int = 0, offset: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fast_to_grid` and whether any element overflowed, bool (): |x / scale| non-finite, or above max once rounded.

    Once rounded, as IEEE 754 defines overflow: under an amax scale the largest element is max (1 +- 2^-23) before
    rounding and would count as overflow half of the time. For the identity spec, and for a block spec, which scales
    every block into range: whether x holds an Inf or NaN.
    """
    if spec.is_identity:
        return x, _has_nonfinite(x)
    if spec.is_block:
        return _blocks_to_grid(x, spec, dtype, seed, step, stream, offset)
    if not _is_served(x, spec, scale):
        cast = partial(to_grid, x, spec, scale, seed=seed, step=step, stream=stream, offset=offset)
        row = get_format(spec.format)
        unbounded = cast(overflow="unbounded")
        return _held(cast(), dtype), ~((unbounded >= row.min) & (unbounded <= row.max)).all()
    given = (x.detach().contiguous(), scale, str(spec))
    draw = (signed_seed(seed), step, stream, offset)
    out, beyond = torch.ops.lp.cast_to_grid(*given, dtype, *draw)
    return (out if _has_room(out, beyond, x) else torch.ops.lp.cast_to_grid(*given, torch.float32, *draw)[0]), beyond


def _has_room(out: Tensor, beyond: Tensor, x: Tensor) -> bool:
    """Whether `out` says what the cast gave: an integer dtype has no NaN."""
    return out.is_floating_point() or not has_values(x) or x.is_cuda or not bool(beyond) or not bool(x.isnan().any())


def _has_nonfinite(x: Tensor) -> Tensor:
    if not x.numel():
        return torch.zeros((), dtype=torch.bool, device=x.device)
    return ~torch.stack(torch.aminmax(x)).isfinite().all()


def _blocks_to_grid(
    x: Tensor, spec: QuantSpec, dtype: torch.dtype, seed: int, step: int, stream: int, offset: int
) -> tuple[Tensor, Tensor]:
    """The grid values of a block spec, in float32 if `dtype` may not have all of them, and whether x holds an Inf or
    NaN.
    """
    plan, is_stochastic = block_plan(get_block_format(spec.format), spec.rounding), spec.rounding == "stochastic"
    if is_stochastic:
        check_counter(step, stream, offset)
    is_column = spec.along in ("column", "batched-column")
    matrix = x.detach().reshape(matrix_shape(x.shape)) if spec.along == "column" else x.detach()
    cast = partial(
        fast_blocks, matrix, plan, is_divided=False, is_stochastic=is_stochastic, is_column=is_column,
        seed=seed, step=step, stream=stream, offset=offset,
    )  # fmt: skip
    fast = cast(dtype=torch.float32 if x.is_cuda and dtype == torch.bfloat16 else dtype)
    if fast is None:
        grid = to_grid(x, spec, None, seed=seed, step=step, stream=stream, offset=offset)
        is_bad = grid.isnan().any()
        if x.is_cuda:
            return grid.float(), is_bad
        held = _held(grid, dtype)
        return held if bool(((held == grid) | grid.isnan()).all()) else grid.float(), is_bad
    is_bad = fast.said & 1 != 0
    if not x.is_cuda and dtype == torch.bfloat16 and int(fast.said) & 2:
        fast = cast(dtype=torch.float32)
        assert fast is not None
    return fast.values.view(x.shape), is_bad


def _held(grid: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 or (dtype == torch.int8 and has_values(grid) and bool(grid.isnan().any())):
        return grid
    return grid.to(dtype)


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


def _cast_to_grid_cuda(
    x: Tensor, scale: Tensor | None, spec_text: str, dtype: torch.dtype, seed: int, step: int, stream: int, offset: int
) -> tuple[Tensor, Tensor]:
    from runtime.kernels.triton.cast import launch_cast  # imports triton

    spec = QuantSpec.parse(spec_text)
    plan = cast_plan(spec.format, spec.rounding)
    assert plan is not None
    draw = None
    if spec.rounding == "stochastic":
        check_counter(step, stream, offset)
        draw = (seed, step, stream, offset)
    return launch_cast(x, scale, plan, dtype, tile_shape(x.shape, spec.scale or _WHOLE), draw)


def _cast_to_grid(
    x: Tensor, scale: Tensor | None, spec_text: str, dtype: torch.dtype, seed: int, step: int, stream: int, offset: int
) -> tuple[Tensor, Tensor]:
    spec = QuantSpec.parse(spec_text)
    plan = _plan(spec)
    assert plan is not None
    out = torch.empty(x.shape, dtype=dtype)
    draw = None
    if spec.rounding == "stochastic":
        check_counter(step, stream, offset)
        draw = random_plan(seed, step, stream, offset)
    beyond = run_cast(plan, x, out, scale, tile_shape(x.shape, spec.scale or _WHOLE), draw)
    return out, torch.tensor(beyond)


def _cast_to_grid_shape(
    x: Tensor, scale: Tensor | None, spec_text: str, dtype: torch.dtype, seed: int, step: int, stream: int, offset: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.bool)


def _to_grid(
    x: Tensor, s: Tensor | None, spec: str, dtype: torch.dtype, seed: int, step: int, stream: int, offset: int
) -> Tensor:
    """Block formats in float32 always: whether bf16 has the values is known only once they are there."""
    parsed = QuantSpec.parse(spec)
    held = torch.float32 if parsed.is_block else dtype
    grid = fast_to_grid(x, parsed, s, dtype=held, seed=seed, step=step, stream=stream, offset=offset)
    return grid.contiguous() if grid is not x else x.clone()


def _to_grid_shape(
    x: Tensor, s: Tensor | None, spec: str, dtype: torch.dtype, seed: int, step: int, stream: int, offset: int
) -> Tensor:
    held = torch.float32 if QuantSpec.parse(spec).is_block else dtype
    held = torch.float64 if x.dtype == torch.float64 and held == torch.float32 else held
    return x.new_empty(x.shape, dtype=held)


_WHOLE = ScaleSpec()
_OPS = Library("lp", "FRAGMENT")
_OPS.define(
    "cast_to_grid(Tensor x, Tensor? scale, str spec, ScalarType dtype, int seed, int step, int stream, int offset) "
    "-> (Tensor, Tensor)"
)
_OPS.impl("cast_to_grid", _cast_to_grid, "CPU")
_OPS.impl("cast_to_grid", _cast_to_grid_cuda, "CUDA")
register_fake("lp::cast_to_grid", _cast_to_grid_shape, lib=_OPS)
_OPS.define(
    "to_grid(Tensor x, Tensor? s, str spec, ScalarType dtype, int seed, SymInt step, SymInt stream, SymInt offset) "
    "-> Tensor"
)
_OPS.impl("to_grid", _to_grid, "CompositeExplicitAutograd")
register_fake("lp::to_grid", _to_grid_shape, lib=_OPS)
