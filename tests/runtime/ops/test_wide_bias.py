"""A bias in fp32 beside bf16 operands is added to the sum in fp32, rounded once: over kinds, shapes and layouts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.numerics import quantize
from runtime.numerics.specs import GemmSpec, LayerSpec, QuantSpec
from runtime.ops import wide_bias
from runtime.ops.contractions import AbstractContraction, Conv, ConvGeometry
from runtime.ops.plan import KINDS, GemmPlan
from runtime.ops.products import multiply
from runtime.quantize.qtensor import QTensor

BF16 = GemmSpec(QuantSpec("bf16"), QuantSpec("bf16"), out="bf16")
LAYER = LayerSpec(BF16, BF16, BF16)


def _values(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def _fwd(kind: str, x: Tensor, w: Tensor, bias: Tensor, geometry: ConvGeometry | None = None) -> Tensor:
    plan = GemmPlan(kind, LAYER, ("bf16", "bf16", "bf16"), 0, geometry)
    operands = QTensor(x, None, BF16.lhs), QTensor(w, None, BF16.rhs)
    return multiply("fwd", plan, *operands, bias, torch.float32, None)


def _assert_rounded_once(y: Tensor, exact: Tensor) -> None:
    """Sums in fp32 move some over an edge by one step; a bias that was rounded moves a tenth of them."""
    wanted = quantize(exact.float(), "bf16")
    assert y.shape == exact.shape
    assert torch.allclose(y, wanted, rtol=2.0**-7, atol=1e-4)
    assert (y != wanted).sum() <= 1 + 0.005 * y.numel()


def _exact(kind: AbstractContraction, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return kind.native(x.double(), w.double(), bias.double())


@pytest.mark.parametrize("kind", ["linear", "linear_kn"])
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3, 5), (300,), (0,)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 9), (128, 65), (96, 256)])
def test_linear_layers_round_once(kind: str, lead: tuple[int, ...], n: int, k: int) -> None:
    torch.manual_seed(0)
    x, w, bias = _values(*lead, k), _values(*((n, k) if kind == "linear" else (k, n))), torch.randn(n)
    for left in (x, _values(*lead, 2 * k)[..., ::2]):
        _assert_rounded_once(_fwd(kind, left, w, bias), _exact(KINDS[kind], left, w, bias))
    wide = torch.randn(2 * n)[::2]
    _assert_rounded_once(_fwd(kind, x, w, wide), _exact(KINDS[kind], x, w, wide))


@pytest.mark.parametrize("bias_shape", [(16,), (1, 16), (24, 16), (24, 1)])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("k", [32, 2048])
def test_products_of_activations_round_once(batch: tuple[int, ...], bias_shape: tuple[int, ...], k: int) -> None:
    torch.manual_seed(0)
    x, w, bias = _values(*batch, 24, k), _values(*batch, k, 16), torch.randn(bias_shape)
    _assert_rounded_once(_fwd("matmul", x, w, bias), _exact(KINDS["matmul"], x, w, bias))


CONVOLUTIONS: dict[str, tuple[ConvGeometry, tuple[int, ...], tuple[int, ...]]] = {
    "1d": (ConvGeometry((2,), (1,), (1,)), (2, 6, 20), (10, 6, 3)),
    "2d": (ConvGeometry((1, 1), (1, 1), (1, 1)), (2, 6, 9, 9), (10, 6, 3, 3)),
    "dilated": (ConvGeometry((2, 1), (0, 2), (2, 1)), (2, 6, 9, 9), (10, 6, 3, 3)),
    "grouped": (ConvGeometry((1, 1), (1, 1), (1, 1), 3), (2, 6, 9, 9), (12, 2, 3, 3)),
    "depthwise": (ConvGeometry((1, 1), (1, 1), (1, 1), 6), (2, 6, 9, 9), (6, 1, 3, 3)),
    "3d": (ConvGeometry((1, 1, 1), (0, 0, 0), (1, 1, 1)), (1, 4, 5, 6, 7), (8, 4, 2, 2, 2)),
    "no batch": (ConvGeometry((1, 1), (1, 1), (1, 1)), (6, 9, 9), (10, 6, 3, 3)),
    "transposed": (ConvGeometry((2, 2), (1, 1), (1, 1), 1, (1, 0)), (2, 6, 9, 9), (6, 10, 3, 3)),
    "transposed grouped": (ConvGeometry((1,), (0,), (2,), 2, (0,)), (2, 6, 9), (6, 5, 3)),
    "no sample": (ConvGeometry((1, 1), (1, 1), (1, 1)), (0, 6, 9, 9), (10, 6, 3, 3)),
}


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions_round_once(name: str) -> None:
    torch.manual_seed(0)
    geometry, x_shape, w_shape = CONVOLUTIONS[name]
    num_channels = w_shape[1] * geometry.groups if geometry.is_transposed else w_shape[0]
    x, w, bias = _values(*x_shape), _values(*w_shape), torch.randn(num_channels)
    exact = _exact(Conv(geometry), x, w, bias)
    _assert_rounded_once(_fwd("conv", x, w, bias, geometry), exact)
    if x.dim() == 4:
        y = _fwd("conv", x.to(memory_format=torch.channels_last), w, bias, geometry)
        _assert_rounded_once(y, exact)
        assert not y.numel() or y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_without_units_the_sum_is_made_in_fp32(kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(wide_bias, "_has_bf16", lambda: False)
    if kind == "linear":
        test_linear_layers_round_once("linear", (300,), 96, 256)
    else:
        test_convolutions_round_once("2d")


def test_a_bias_in_bf16_is_torchs_own() -> None:
    torch.manual_seed(0)
    x, w, bias = _values(64, 128), _values(96, 128), _values(96)
    assert torch.equal(_fwd("linear", x, w, bias), torch.nn.functional.linear(x, w, bias).float())
