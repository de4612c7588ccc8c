"""The oracle on a device that is not the CPU: meta tensors show every tensor it would make on the wrong one."""

import pytest
import torch

from runtime.numerics.casts import to_grid
from runtime.numerics.scaling import compute_scale
from runtime.numerics.specs import QuantSpec

SPECS = ["e4m3 stochastic row/amax", "dlfloat16", "nf4", "nf4 stochastic", "int8 nearest_even tensor/pow2"]
SPECS += ["e4m3 nearest_even block[3,16]/amax", "mxfp8", "nvfp4", "mxfp4 stochastic"]


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_casts_stay_on_their_device(text: str, dtype: torch.dtype) -> None:
    x, spec = torch.empty(6, 64, device="meta", dtype=dtype), QuantSpec.parse(text)
    grid = to_grid(x, spec, compute_scale(x, spec))
    assert (grid.device.type, grid.shape) == ("meta", x.shape)
