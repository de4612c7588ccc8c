"""Block grid: a cast to a block format with all that belongs to it, as one torch op: the transform before it, the scale
of the tensor, the grid values.

    lp::cast_blocks    lp::to_grid of lp::rotate_values of x, its scale, and what a caller must know of it

Eager code runs it; compiled code has the three ops. The kernels turn x piece by piece, in a cache, so that what is
turned lies nowhere in memory, and the largest magnitude is looked for once.
"""

import torch
from torch import Tensor

from runtime.kernels.cast.grid import SAID_NARROW, fast_to_grid_checked, roomy_dtype
from runtime.kernels.cast.rotate import rotated
from runtime.kernels.cast.scales import compute_scale
from runtime.kernels.cast_plans import block_plan, corrected_plan
from runtime.kernels.cpu.block_cast import fast_blocks
from runtime.kernels.cpu.rotate import turn_plan
from runtime.kernels.fake import has_values
from runtime.kernels.torch_ops import declare
from runtime.numerics.block_formats import get_block_format
from runtime.numerics.hadamard import signs_of
from runtime.numerics.random import check_counter, signed_seed
from runtime.numerics.scaling import matrix_shape
from runtime.numerics.specs import QuantSpec


def is_one_op(x: Tensor, spec: QuantSpec) -> bool:
    """Whether `fast_block_cast` is for this cast: it looks at what it made."""
    is_worth_it = spec.is_block and (spec.transform is not None or spec.has_scale)
    return is_worth_it and not torch.compiler.is_compiling() and not x.is_cuda and has_values(x)


def fast_block_cast(
    x: Tensor, spec: QuantSpec, *, dtype: torch.dtype, seed: int = 0, step: int = 0, stream: int = 0, signs: int = 0
) -> tuple[Tensor, Tensor | None, bool]:
    """(grid values of x, turned first where the spec has a transform, in `dtype`, or float32 where bfloat16 does not
    hold them; the scale of the tensor; whether x holds Inf or NaN). `is_one_op` must hold. signs: the stream of the
    signs.
    """
    call = (signed_seed(seed), step, stream, signs)
    grid, scale, said = torch.ops.lp.cast_blocks.default(x.detach(), spec.text, dtype, *call)
    if not has_values(said):  # x has, and is used in a trace
        return *torch.ops.lp.cast_blocks.default(x.detach(), spec.text, roomy_dtype(spec, dtype), *call)[:2], False
    bits = int(said)
    if bits & SAID_NARROW:
        grid, scale, _ = torch.ops.lp.cast_blocks.default(x.detach(), spec.text, torch.float32, *call)
    return grid, scale if spec.has_scale else None, bool(bits & ~SAID_NARROW)


def _cast_blocks(
    x: Tensor, spec: str, dtype: torch.dtype, seed: int, step: int, stream: int, signs: int
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = QuantSpec.parse(spec)
    row, transform, is_stochastic = get_block_format(parsed.format), parsed.transform, parsed.rounding == "stochastic"
    if is_stochastic:
        check_counter(step, stream, 0)
    turned_by = None if transform is None else signs_of(transform, seed=seed, step=step, stream=signs)
    fast = fast_blocks(
        x.reshape(matrix_shape(x.shape)) if parsed.along == "column" else x,
        row,
        block_plan(row, parsed.rounding),
        is_divided=False,
        is_stochastic=is_stochastic,
        corrected=corrected_plan(row, parsed.rounding),
        turn=None if transform is None or turned_by is None else turn_plan(transform, turned_by),
        dtype=dtype,
        is_column=parsed.along in ("column", "batched-column"),
        seed=seed,
        step=step,
        stream=stream,
    )
    if fast is not None:
        said = fast.said if dtype == torch.bfloat16 else fast.said & ~SAID_NARROW
        return fast.values.view(x.shape), 1.0 / fast.divisor, said
    y = rotated(x, parsed, seed=seed, step=step, stream=signs)
    scale = compute_scale(y, parsed)
    key = {"seed": seed, "step": step, "stream": stream}
    grid, is_bad = fast_to_grid_checked(y, parsed, scale, dtype=dtype, **key)
    is_narrow = SAID_NARROW if grid.dtype != dtype and dtype == torch.bfloat16 else 0
    said = torch.tensor(int(is_bad) | is_narrow, dtype=torch.uint8)
    return grid.to(dtype) if is_narrow else grid, torch.ones(()) if scale is None else scale, said


def _shape(
    x: Tensor, spec: str, dtype: torch.dtype, seed: int, step: int, stream: int, signs: int
) -> tuple[Tensor, Tensor, Tensor]:
    is_wide = x.dtype == torch.float64 and dtype == torch.float32 and not QuantSpec.parse(spec).has_scale
    grid = torch.empty(x.shape, dtype=torch.float64 if is_wide else dtype, device=x.device)
    return grid, x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.uint8)


declare(
    "cast_blocks(Tensor x, str spec, ScalarType dtype, SymInt seed, SymInt step, SymInt stream, SymInt signs) "
    "-> (Tensor, Tensor, Tensor)",
    _cast_blocks,
    fake=_shape,
)
