"""PACT and LSQ against their papers: vectors by hand, and autograd of the piecewise-linear definitions in float64."""

import pytest
import torch
from torch import Tensor

from runtime.numerics.specs import QuantSpec
from runtime.quantize.kinds import make_quantizer
from runtime.quantize.learned.lsq import Lsq
from runtime.quantize.learned.pact import Pact
from runtime.quantize.learned.quantizer import Learned


def _make(text: str, is_weight: bool = False) -> Learned:
    return make_quantizer(QuantSpec.parse(text), "fc.w" if is_weight else "fc.x", is_weight)


def _cast(quantizer: Learned, x: Tensor) -> Tensor:
    q = quantizer.cast(x)
    assert q.scale is not None
    return q.grid.float() * q.scale


def _run(quantizer: Learned, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx and the gradient of the parameter."""
    x = x.clone().requires_grad_()
    quantizer.carrier(x, quantizer(x)).backward(dy)
    (parameter,) = quantizer.parameters()
    assert x.grad is not None
    assert parameter.grad is not None
    grad, parameter.grad = parameter.grad, None
    return x.grad, grad


def _pact_in_float64(x: Tensor, clip: Tensor, low: float, high: float) -> Tensor:
    """clip(x, low s, a), what PACT's gradient is of."""
    inside = torch.where(x >= clip, clip, x)
    if low == 0:
        return torch.where(x < 0, torch.zeros_like(x), inside)
    return torch.where(x <= low / high * clip, low / high * clip, inside)


def _lsq_in_float64(x: Tensor, step: Tensor, low: float, high: float) -> Tensor:
    """s round(clip(x / s)), rounding having derivative one."""
    v = x / step
    inside = v + (v.round() - v).detach()
    ends = torch.where(v <= low, low, torch.where(v >= high, high, inside))
    return step * ends


@pytest.mark.parametrize("format", ["uint4", "int4", "int8", "uint2", "int4:range=full"])
def test_pact_has_the_gradients_of_its_clip(format: str) -> None:
    torch.manual_seed(0)
    quantizer = _make(f"{format} nearest_even pact[init=1.5]")
    x, dy = torch.randn(64, 8) * 1.5, torch.randn(64, 8)
    dx, dclip = _run(quantizer, x, dy)
    wide, clip = x.double().requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    _pact_in_float64(wide, clip, quantizer.low, quantizer.high).backward(dy.double())
    assert wide.grad is not None
    assert clip.grad is not None
    assert torch.equal(dx, wide.grad.float())
    torch.testing.assert_close(dclip.double().sum(), clip.grad, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("is_weight", [True, False])
@pytest.mark.parametrize("format", ["uint4", "int4", "int8", "int3:range=full"])
def test_lsq_has_the_gradients_of_its_paper(format: str, is_weight: bool) -> None:
    torch.manual_seed(0)
    quantizer = _make(f"{format} nearest_even lsq[init=0.375]", is_weight)
    x, dy = torch.randn(64, 8) * 2, torch.randn(64, 8)
    dx, dstep = _run(quantizer, x, dy)
    wide, step = x.double().requires_grad_(), torch.tensor(0.375, dtype=torch.float64, requires_grad=True)
    _lsq_in_float64(wide, step, quantizer.low, quantizer.high).backward(dy.double())
    assert wide.grad is not None
    assert step.grad is not None
    assert torch.equal(dx, wide.grad.float())
    num = x.numel() if is_weight else x[0].numel()
    torch.testing.assert_close(dstep.double().sum(), step.grad / (num * quantizer.high) ** 0.5, rtol=1e-5, atol=1e-5)


def test_pact_of_two_bits() -> None:
    x = torch.tensor([-0.5, 0.0, 0.1, 0.3, 0.5, 0.9, 1.0, 1.7])
    quantizer = _make("uint2 nearest_even pact[init=1.0]")
    torch.testing.assert_close(_cast(quantizer, x), torch.tensor([0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1]))
    slopes = [_run(quantizer, x, row)[1].item() for row in torch.eye(8)]
    assert slopes == [0, 0, 0, 0, 0, 0, 1, 1]
    assert _run(quantizer, x, torch.ones(8))[0].tolist() == [0, 1, 1, 1, 1, 1, 0, 0]


def test_lsq_of_three_bits() -> None:
    x = torch.tensor([-3, -2.2, -2, -0.3, 0, 0.25, 0.26, 0.75, 1.2, 1.5, 1.6, 2.7])
    quantizer = _make("int3:range=full nearest_even lsq[init=0.5]", is_weight=True)
    wanted = torch.tensor([-2, -2, -2, -0.5, 0, 0, 0.5, 1, 1, 1.5, 1.5, 1.5])
    assert torch.equal(_cast(quantizer, x), wanted)
    slopes = torch.tensor([_run(quantizer, x, row)[1].item() for row in torch.eye(12)]) * 6  # g = 1 / sqrt(12 3)
    torch.testing.assert_close(slopes, torch.tensor([-4, -4, -4, -0.4, 0, -0.5, 0.48, 0.5, -0.4, 3, 3, 3]))
    assert _run(quantizer, x, torch.ones(12))[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]


def test_lsq_begins_at_what_it_sees_first_and_stays() -> None:
    x = torch.tensor([-3, -2.2, -2, -0.3, 0, 0.25, 0.26, 0.75, 1.2, 1.5, 1.6, 2.7])
    quantizer = _make("int3:range=full nearest_even lsq", is_weight=True)
    torch.testing.assert_close(quantizer(x).item(), 1.5165067, rtol=1e-6, atol=0)
    torch.testing.assert_close(quantizer(100 * x).item(), 1.5165067, rtol=1e-6, atol=0)


@pytest.mark.parametrize("first", [torch.zeros(4, 4), torch.full((4, 4), torch.inf), torch.full((4, 4), torch.nan)])
def test_lsq_of_a_first_batch_that_says_nothing_is_finite(first: Tensor) -> None:
    quantizer = _make("int4 nearest_even lsq")
    assert quantizer(first).item() == pytest.approx(1 / 7)
    dx, dstep = _run(quantizer, torch.randn(4, 4), torch.randn(4, 4))
    assert bool(dx.isfinite().all() & dstep.isfinite().all())


@pytest.mark.parametrize("text", ["int4 nearest_even lsq[init=0.5]", "uint4 nearest_even pact[init=2.0]"])
def test_a_scale_stays_above_zero_and_comes_back(text: str) -> None:
    quantizer = _make(text)
    (parameter,) = quantizer.parameters()
    first = quantizer(torch.ones(2, 2)).item()
    with torch.no_grad():
        parameter.sub_(10.0)  # a learning rate of 10
    scale = quantizer(torch.ones(2, 2))
    assert 0 < scale.item() <= first / 512
    scale.backward()
    assert parameter.grad is not None
    assert parameter.grad.item() == 0  # it would go further down
    parameter.grad = None
    (-quantizer(torch.ones(2, 2))).backward()
    assert parameter.grad.item() < 0


def test_the_key_is_the_quantizer_and_what_it_has_learned() -> None:
    one, other = _make("int4 nearest_even lsq[init=0.5]"), _make("int4 nearest_even lsq[init=0.5]")
    other.owner = "fc2.x"
    assert one.key != other.key
    before = one.key
    assert one.cast(torch.ones(2)).key == before
    with torch.no_grad():
        next(one.parameters()).add_(1)
    assert one.key != before


def test_a_scale_in_bf16_is_computed_in_fp32() -> None:
    for quantizer in (_make("int4 nearest_even lsq[init=0.5]").bfloat16(), _make("uint4 nearest_even pact").bfloat16()):
        assert isinstance(quantizer, (Lsq, Pact))
        assert quantizer(torch.ones(2, 2).bfloat16()).dtype == torch.float32
        dx, grad = _run(quantizer, torch.randn(4, 4).bfloat16(), torch.randn(4, 4).bfloat16())
        assert (dx.dtype, grad.dtype) == (torch.bfloat16, torch.bfloat16)
