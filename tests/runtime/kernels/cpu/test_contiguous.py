"""Copies into C order against torch's own."""

import pytest
import torch
from torch import Tensor

from runtime.kernels.cast.scales import compute_scale
from runtime.kernels.cpu import contiguous as module
from runtime.kernels.cpu.contiguous import contiguous
from runtime.numerics import quantize
from runtime.numerics.specs import QuantSpec
from runtime.quantize.quantizer import to_grid

LARGE = torch.arange(3 * 70 * 1000.0).view(3, 70, 1000)
VIEWS = {
    "transposed": LARGE[0].t(),
    "transposed, ragged": LARGE[0, :65, :977].t(),
    "every other column": LARGE[1, :, ::2],
    "every other row": LARGE[1, ::2],
    "transposed in a batch": LARGE.mT,
    "a batch of columns": LARGE[:, :, 3:900:3],
    "expanded": torch.arange(400.0)[:, None].expand(400, 300),
    "a row, expanded": torch.arange(300.0).expand(200, 300),
    "permuted": LARGE.permute(2, 0, 1),
    "permuted, another way": LARGE.permute(1, 0, 2),
    "one row": LARGE.view(1, -1)[:, ::2],
    "no row": LARGE[0, :0].t(),
    "strided in 1-d": LARGE.view(-1)[::3],
    "four dims": LARGE.view(3, 7, 10, 1000).mT,
    "already": LARGE,
    "images": LARGE.view(3, 70, 10, 100).contiguous(memory_format=torch.channels_last),
}  # fmt: skip


def _like(laid: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`, with the strides of `laid`; what it expands, of the first of each."""
    first = values[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in laid.stride())]
    strides = [1 if size == 1 else stride for size, stride in zip(first.shape, laid.stride())]
    return torch.empty_strided(first.shape, strides, dtype=dtype).copy_(first).expand(values.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int32])
@pytest.mark.parametrize("name", VIEWS)
def test_has_the_elements_of_torchs(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    base = _like(VIEWS[name], VIEWS[name], dtype)
    monkeypatch.setattr(module, "_FEW", 0)
    found = contiguous(base)
    assert found.is_contiguous()
    assert found.dtype == dtype
    assert torch.equal(found, base)
    assert (found.data_ptr() == base.data_ptr()) == base.is_contiguous()


def test_a_lazily_negated_tensor() -> None:
    x = torch.complex(LARGE[0], LARGE[1]).conj().imag.t()
    assert x.is_neg()
    assert torch.equal(contiguous(x), -LARGE[1].t())
    assert torch.equal(quantize(x, "e4m3"), quantize(-LARGE[1].t(), "e4m3"))


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "no row"])
def test_casts_of_views_are_casts_of_their_copies(name: str) -> None:
    view = (VIEWS[name] - 1e5) / 4  # within fp16
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = _like(VIEWS[name], view, dtype)
        copied = x.clone(memory_format=torch.contiguous_format)
        for format in ("e4m3", "nf4", "mxfp8", "nvfp4", "1-6-9"):
            for rounding in ("nearest_even", "stochastic"):
                assert torch.equal(quantize(x, format, rounding, seed=3), quantize(copied, format, rounding, seed=3))
        row = torch.rand(*x.shape[:-1], 1) + 0.5
        assert torch.equal(quantize(x, "e4m3", scale=row), quantize(copied, "e4m3", scale=row))
        for text in ("e4m3 nearest_even row/amax", "int8 stochastic column/amax", "nf4 nearest_even tensor/amax"):
            spec = QuantSpec.parse(text)
            scale = compute_scale(copied, spec)
            assert torch.equal(to_grid(x, scale, spec), to_grid(copied, scale, spec))
