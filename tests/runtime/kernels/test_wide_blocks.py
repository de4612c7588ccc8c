"""Block casts of fp64 tensors: quantize against the oracle, bit for bit, with numbers that fp32 does not have."""

import pytest
import torch

from runtime.numerics import quantize
from runtime.numerics.block_casts import quantize_blocks
from runtime.numerics.specs import Rounding

WIDE = [0.0, -0.0, 1e300, -1e40, 5e-324, 1e-46, 3.4028234663852886e38, 1 + 2.0**-40, float("inf"), float("nan")]


@pytest.mark.parametrize("mode", ["nearest_even", "nearest_away", "toward_zero", "stochastic"])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp8-e5m2", "mxfp4:scale=rceil", "mxfp6:scale=even", "mxint8", "nvfp4"])
@pytest.mark.parametrize("columns", [64, 77])
def test_fp64_blocks_are_the_oracles(name: str, mode: Rounding, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(40, columns, generator=generator, dtype=torch.float64)
    x *= torch.exp2(torch.linspace(-300, 300, 40, dtype=torch.float64))[:, None]
    x[:10, 3] = torch.tensor(WIDE, dtype=torch.float64)
    draw = {"seed": 1, "step": 2, "stream": 3, "offset": 4}
    for given in (x, x[::2], x.mT):
        found, wanted = quantize(given, name, mode, **draw), quantize_blocks(given, name, mode, **draw)
        assert found.dtype == torch.float64
        assert bool(
            (
                (found.view(torch.int64) == wanted.contiguous().view(torch.int64)) | (found.isnan() & wanted.isnan())
            ).all()
        )
