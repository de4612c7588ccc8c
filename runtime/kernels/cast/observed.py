"""Casts that observe: a cast under a known scale, and max |x| of what is cast, in one pass where a kernel serves.

    lp::to_grid_observed    grid values of x / s, and max |x|, fp32 () on the device of x

The values are those of runtime/kernels/cast/grid.py, bit for bit; the maximum is exact in any order.
"""

import torch
from torch import Tensor

from runtime.kernels.cast.grid import fast_to_grid, roomy_dtype
from runtime.kernels.cast_plans import cast_plan, table_plan
from runtime.kernels.cpu.cast_library import cast_library, is_readable, run_cast_observed
from runtime.kernels.cpu.contiguous import contiguous
from runtime.kernels.cpu.philox import random_plan
from runtime.kernels.fake import has_values
from runtime.kernels.torch_ops import declare
from runtime.numerics.random import signed_seed
from runtime.numerics.scaling import group_amax
from runtime.numerics.specs import QuantSpec, ScaleSpec


def to_grid_observed(
    x: Tensor, spec: QuantSpec, scale: Tensor, dtype: torch.dtype, *, seed: int = 0, step: int = 0, stream: int = 0
) -> tuple[Tensor, Tensor]:
    """`fast_to_grid(x, spec, scale, dtype=dtype, ...)` and max |x|, fp32 (): NaN where x holds one, 0 if it is empty.
    x elementwise of one scale per tensor; a NaN in int8 makes it float32, as there.
    """
    if not has_values(x):
        dtype = roomy_dtype(spec, dtype)
    grid: Tensor
    grid, amax = torch.ops.lp.to_grid_observed.default(
        x.detach(), scale, spec.text, dtype, signed_seed(seed), step, stream
    )
    if dtype == torch.int8 and has_values(x) and not x.is_cuda and bool(amax.isnan()):
        grid = fast_to_grid(x, spec, scale, dtype=dtype, seed=seed, step=step, stream=stream)
    return grid, amax


def largest(x: Tensor) -> Tensor:
    """max |x|, fp32 (): NaN where x holds one."""
    return group_amax(x.detach(), ScaleSpec()).float()


def _observed(
    x: Tensor, s: Tensor, spec: str, dtype: torch.dtype, seed: int, step: int, stream: int
) -> tuple[Tensor, Tensor]:
    parsed = QuantSpec.parse(spec)
    plan = cast_plan(parsed.format, parsed.rounding) or table_plan(parsed.format, parsed.rounding)
    is_served = is_readable(x) and plan is not None and s.is_cpu and s.dtype == torch.float32
    if not is_served or cast_library() is None:
        grid = fast_to_grid(x, parsed, s, dtype=dtype, seed=seed, step=step, stream=stream)
        return grid.to(dtype) if grid.dtype != torch.float64 else grid, largest(x)
    assert plan is not None
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    random = random_plan(seed, step, stream, 0) if parsed.is_stochastic else None
    amax = run_cast_observed(plan, contiguous(x), out, s, random)
    return out, torch.tensor(amax, device="cpu")


def _shape(
    x: Tensor, s: Tensor, spec: str, dtype: torch.dtype, seed: int, step: int, stream: int
) -> tuple[Tensor, Tensor]:
    is_wide = x.dtype == torch.float64 and dtype == torch.float32
    grid = torch.empty(x.shape, dtype=torch.float64 if is_wide else dtype, device=x.device)
    return grid, x.new_empty((), dtype=torch.float32)


declare(
    "to_grid_observed(Tensor x, Tensor s, str spec, ScalarType dtype, SymInt seed, SymInt step, SymInt stream) "
    "-> (Tensor, Tensor)",
    _observed,
    fake=_shape,
)
