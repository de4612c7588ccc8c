"""grid.cpp against the oracle, bit for bit: what cast.cpp does not serve."""

import math

import pytest
import torch
from torch import Tensor

from runtime.kernels.cpu.grid import grid_library, on_grid
from runtime.numerics import get_format
from runtime.numerics.embedding import finite_values
from runtime.numerics.format_kinds import LookupFormat
from runtime.numerics.grid import GridOverflow, round_to_grid
from runtime.numerics.specs import ROUNDINGS, Rounding

pytestmark = pytest.mark.skipif(grid_library() is None, reason="no C++ compiler")
FORMATS = [
    *("e4m3", "e5m2", "hfp8-143", "1-6-9", "dlfloat16", "dlfloat16:e0=zero", "bf16", "fp32", "pow2", "binary8p3"),
    *("1-4-3:subnormals=no", "1-8-0:top=none,bias=140", "int1", "int8", "int32", "uint8:zero=7"),
    *("nf4", "e8m0", "fp4-radix4"),
]  # fmt: skip


def _inputs(name: str, dtype: torch.dtype) -> Tensor:
    """Values, midpoints and their neighbours, every exponent, what is special; the signs of all."""
    row, generator = get_format(name), torch.Generator().manual_seed(1)
    grid = torch.tensor(finite_values(row) if row.bits <= 8 else [row.max, row.tiny, 1.0], dtype=torch.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    exponents = torch.linspace(-1080, 1023, 3000, dtype=torch.float64)
    spread = torch.exp2(exponents) * (1 + torch.rand(3000, generator=generator, dtype=torch.float64))
    near = torch.randn(4001, generator=generator, dtype=torch.float64) * min(row.max, 1e30) / 3
    special = torch.tensor([0.0, math.inf, math.nan, 5e-324, 1.7976931348623157e308, 3.5e38], dtype=torch.float64)
    points = torch.cat([grid, middle, grid * 1.01, spread, near, special]).to(dtype)
    up = torch.tensor(math.inf, dtype=dtype)
    every = torch.cat([points, points.nextafter(up), points.nextafter(-up)])
    return torch.cat([every, -every])


@pytest.mark.parametrize("overflow", ["saturate", "ieee"])
@pytest.mark.parametrize("mode", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_oracle(name: str, dtype: torch.dtype, mode: Rounding, overflow: GridOverflow) -> None:
    row = get_format(name)
    if mode == "toward_zero" and isinstance(row, LookupFormat) and row.signed and 0.0 not in row.grid:
        pytest.skip("there is nothing toward zero")
    x, view = _inputs(name, dtype), torch.int64 if dtype == torch.float64 else torch.int32
    for scale in (None, torch.tensor(0.3, dtype=dtype)):
        found = on_grid(x, name, mode, scale, 3, 4, 5, 6, overflow)
        wanted = round_to_grid(x, row, mode, scale, 3, 4, 5, 6, overflow)
        is_same = (found.view(view) == wanted.view(view)) | (found.isnan() & wanted.isnan())
        assert bool(is_same.all()), (x[~is_same][:5], found[~is_same][:5], wanted[~is_same][:5])
