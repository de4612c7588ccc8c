"""Folding against a batch norm and a layer of torch's in float64: every kind of layer, both sides, groups, no bias."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.ops.batch_norm import fold_bias, fold_input_bias, fold_weight, norm_scale, norm_shift
from runtime.ops.contractions import linear_kn
from runtime.ops.dialect import OPS

_EPS = 1e-5


@dataclass(frozen=True)
class _Layer:
    """`run(x, w, b)`, sizes of x and w, the axis of w along which outputs lie, and groups."""

    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    x: tuple[int, ...]
    w: tuple[int, ...]
    axis: int
    groups: int = 1

    @property
    def num_out(self) -> int:
        return self.w[self.axis] * (self.groups if self.axis == 1 else 1)


LAYERS = {
    "linear": _Layer(F.linear, (5, 6), (8, 6), 0),
    "linear_kn": _Layer(lambda x, w, b: linear_kn(x, w, b), (5, 6), (6, 8), 1),
    "conv1d": _Layer(F.conv1d, (2, 6, 9), (8, 6, 3), 0),
    "conv2d": _Layer(F.conv2d, (2, 6, 7, 7), (8, 6, 3, 3), 0),
    "conv3d": _Layer(F.conv3d, (2, 6, 4, 5, 6), (8, 6, 1, 2, 3), 0),
    "grouped": _Layer(lambda x, w, b: F.conv2d(x, w, b, groups=2), (2, 6, 7, 7), (8, 3, 3, 3), 0, 2),
    "depthwise": _Layer(lambda x, w, b: F.conv1d(x, w, b, groups=6), (2, 6, 9), (6, 1, 3), 0, 6),
    "transposed": _Layer(lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), (2, 6, 4, 4), (6, 8, 3, 3), 1),
    "grouped transposed": _Layer(lambda x, w, b: F.conv_transpose1d(x, w, b, groups=3), (2, 6, 5), (6, 2, 3), 1, 3),
}


def _norm(features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(features), torch.rand(features) + 0.1, torch.randn(features), torch.randn(features)


def _affine(norm: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    mean, var, weight, bias = norm
    s = norm_scale(weight, var, eps=_EPS)
    return s, norm_shift(bias, mean, s)


def _within_rounding(layer: _Layer, x: Tensor, w: Tensor, b: Tensor, wanted: Tensor) -> None:
    """float32 and the bound of the numeric contract: a few ulp times the sum of |w'| |x|, and of |b'|."""
    found = layer.run(x, w, b)
    sizes = layer.run(x.abs(), w.abs(), b.abs())
    assert ((found.double() - wanted).abs() <= 8 * 2**-24 * sizes.double() + 1e-6).all()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_norm_after_a_layer_moves_into_it(name: str, has_bias: bool) -> None:
    layer = LAYERS[name]
    torch.manual_seed(0)
    x, w, b = torch.randn(layer.x), torch.randn(layer.w), torch.randn(layer.num_out) if has_bias else None
    norm = _norm(layer.num_out)
    s, t = _affine(norm)
    y = layer.run(x.double(), w.double(), None if b is None else b.double())
    mean, var, weight, bias = (each.double() for each in norm)
    wanted = F.batch_norm(y, mean, var, weight, bias, False, 0.1, _EPS)
    folded = fold_weight(w, s, axis=layer.axis, groups=layer.groups)
    _within_rounding(layer, x, folded, fold_bias(w, b, s, t), wanted)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", [name for name in LAYERS if "transposed" not in name])
def test_a_batch_norm_before_a_layer_without_padding_moves_into_it(name: str, has_bias: bool) -> None:
    layer = LAYERS[name]
    torch.manual_seed(1)
    x, w, b = torch.randn(layer.x), torch.randn(layer.w), torch.randn(layer.num_out) if has_bias else None
    norm = _norm(layer.x[1])
    s, t = _affine(norm)
    mean, var, weight, bias = (each.double() for each in norm)
    z = F.batch_norm(x.double(), mean, var, weight, bias, False, 0.1, _EPS)
    wanted = layer.run(z, w.double(), None if b is None else b.double())
    along = {"axis": 1 - layer.axis, "groups": layer.groups}
    shifted = fold_input_bias(w, b, t, **along)
    folded = fold_weight(w, s, **along)
    sizes = layer.run(x.abs(), folded.abs(), fold_input_bias(w.abs(), None if b is None else b.abs(), t.abs(), **along))
    assert ((layer.run(x, folded, shifted).double() - wanted).abs() <= 8 * 2**-24 * sizes.double() + 1e-6).all()


def test_the_scale_is_rounded_once_per_operation() -> None:
    var, weight = torch.rand(1000), torch.randn(1000)
    root = (var + torch.tensor(_EPS)).double().sqrt().float()
    inverse = (1 / root.double()).float()
    assert torch.equal(norm_scale(weight, var, eps=_EPS), (inverse.double() * weight.double()).float())
    assert torch.equal(norm_scale(None, var, eps=_EPS), inverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_folds_are_in_the_dtype_of_the_weight_and_computed_in_fp32_at_least(dtype: torch.dtype) -> None:
    w, b = torch.randn(4, 3, dtype=dtype), torch.randn(4, dtype=dtype)
    s, t = torch.randn(4), torch.randn(4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(fold_weight(w, s, axis=0, groups=1), (w.to(wide) * s[:, None]).to(dtype))
    assert torch.equal(fold_bias(w, b, s, t), (b.to(wide) * s + t).to(dtype))
    assert fold_bias(w, None, s, t).dtype == fold_input_bias(w, None, t[:3], axis=1, groups=1).dtype == dtype


def test_gradients_flow_to_every_operand() -> None:
    mean, var, weight, bias, w, b = (torch.rand(3, dtype=torch.float64) + 1 for _ in range(6))
    w = torch.rand(3, 2, dtype=torch.float64)
    operands = [each.requires_grad_() for each in (mean, var, weight, bias, w, b)]

    def fold(*given: Tensor) -> tuple[Tensor, Tensor]:
        mean, var, weight, bias, w, b = given
        s = norm_scale(weight, var, eps=_EPS)
        return fold_weight(w, s, axis=0, groups=1), fold_bias(w, b, s, norm_shift(bias, mean, s))

    assert torch.autograd.gradcheck(fold, operands)


def test_the_ops_are_these_functions() -> None:
    functions = (norm_scale, norm_shift, fold_weight, fold_bias, fold_input_bias)
    assert [OPS[f"lp.{each.__name__}"].run for each in functions] == list(functions)
