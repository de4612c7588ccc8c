"""SGD as three AXPYs: a hand vector, exact sums against fractions, swamping and its cure, torch's bits."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from runtime.errors import LpError, NotSupported
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from runtime.numerics.random import random_bits
from runtime.numerics.rounding import round_to_integer
from runtime.optim.formats import UpdateFormats
from runtime.optim.places import Run
from runtime.optim.rounding import KEY, Draw, combined, rounded
from runtime.optim.sgd import LowPrecisionSGD

DLFLOAT = UpdateFormats("dlfloat16", "dlfloat16", rounding="stochastic")


def _exact(a: float, x: float, b: float, y: float) -> Fraction:
    a, b = (torch.tensor(each, dtype=torch.float32).item() for each in (a, b))
    return Fraction(a) * Fraction(x) + Fraction(b) * Fraction(y)


def _on_grid(value: Fraction, format: str, rounding: str, word: int) -> float:
    """By fractions: the two neighbours, and which of them. Finite values within the format's range."""
    row = get_format(format)
    assert isinstance(row, FloatFormat)
    size, exponent = abs(value), row.emin
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    ulp = Fraction(2) ** (exponent - row.mantissa)
    below, rest = divmod(size, ulp)
    rest /= ulp
    up = {
        "nearest_even": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1),
        "nearest_away": rest >= Fraction(1, 2),
        "toward_zero": False,
        "stochastic": rest >= 1 - Fraction(word, 2**32),
    }[rounding]
    return float((below + up) * ulp) * (-1 if value < 0 else 1)


def _tiny(format: str) -> float:
    row = get_format(format)
    assert isinstance(row, FloatFormat)
    return row.tiny


@pytest.mark.parametrize("format", ["fp32", "bf16", "dlfloat16", "1-6-9", "1-5-2"])
@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero", "stochastic"])
def test_an_axpy_is_rounded_once(format: str, rounding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, generator=generator) for _ in range(2))
    y[:100] *= 2.0 ** torch.arange(-40, 60)[:100].clamp(max=12)
    y[100], x[100] = 1.0, 2.0**-30  # far below half of an ulp, on either side of a tie
    y[101], x[101] = 1 + 2.0**-10, 2.0**-40
    y[102], x[102] = 1 + 2.0**-10, -(2.0**-40)
    draw = Draw(7, 3, 5, [Run(0, 300, 1000)])
    ours = rounded(combined(0.3, x, 1.1, y), format, rounding, draw)  # type: ignore[arg-type]
    words = random_bits(300, seed=7 ^ KEY, step=3, stream=5, offset=1000).tolist()
    mode = "nearest_even" if format == "fp32" else rounding
    expected = [
        _on_grid(_exact(0.3, p, 1.1, q), format, mode, word) for p, q, word in zip(x.tolist(), y.tolist(), words)
    ]
    inside = [i for i, value in enumerate(expected) if abs(value) >= _tiny(format)]
    assert len(inside) > 250
    assert [ours[i].item() for i in inside] == [expected[i] for i in inside]


def test_the_hand_vector_of_the_reference() -> None:
    """Appendix A4: w = .75, dw = .01, lambda = 1e-4, m = .9, dw_old = -.002, eta = -.1, in 1-6-9."""
    w, dw, old = torch.tensor([0.75]), torch.tensor([0.0099945068359375]), torch.tensor([-0.002])

    def take(value: Tensor, u: float) -> float:
        ulp = 2.0 ** (torch.frexp(value)[1].item() - 10)
        u = u if value > 0 else 1 - u - 2.0**-40  # A4 rounds floor(signed t + u), ours is symmetric about zero
        size = round_to_integer(value.abs() / ulp, "stochastic", torch.tensor([u], dtype=torch.float64))
        return float(torch.copysign(size * ulp, value))

    first = take(combined(1.0, dw, 1e-4, w), 0.3)
    assert first == 0.01007080078125
    second = take(combined(0.9, old, -0.1, torch.tensor([first])), 0.6)
    assert second == -0.0028076171875
    third = combined(1.0, w, 1.0, torch.tensor([second]))
    assert third.item() == 0.7471923828125
    assert (take(third, 0.2), take(third, 0.9)) == (0.7470703125, 0.748046875)


@pytest.mark.parametrize("format", ["dlfloat16", "1-6-9"])
def test_nearest_stands_still_where_stochastic_arrives(format: str) -> None:
    """w = 1, 4096 updates of 2^-12: below half an ulp. Standard deviation of the stochastic end: 0.041."""
    ends = {}
    for rounding in ("nearest_even", "nearest_away", "stochastic"):
        w = nn.Parameter(torch.ones(64))
        formats = UpdateFormats(format, format, rounding=rounding)  # type: ignore[arg-type]
        optimizer = LowPrecisionSGD([w], lr=2.0**-12, momentum=0.0, formats=formats)
        for _ in range(4096):
            w.grad = -torch.ones(64)
            optimizer.step()
        ends[rounding] = w.detach()
    assert torch.equal(ends["nearest_even"], torch.ones(64))
    assert torch.equal(ends["nearest_away"], torch.ones(64))
    assert abs(ends["stochastic"].mean() - 2) < 5 * 0.041 / 8
    assert 0.02 < ends["stochastic"].std() < 0.08


@pytest.mark.parametrize(("momentum", "decay"), [(0.5, 0.01), (0.0, 0.1), (0.25, 0.0)])
def test_powers_of_two_give_the_bits_of_torch(momentum: float, decay: float) -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(37, 5))
    theirs = nn.Parameter(ours.detach().clone())
    numbers = {"lr": 2.0**-6, "momentum": momentum, "weight_decay": decay}
    optimizers = LowPrecisionSGD([ours], **numbers), torch.optim.SGD([theirs], **numbers)  # type: ignore[arg-type]
    for _ in range(50):
        ours.grad = torch.randn(37, 5)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_other_numbers_are_nearer_to_float64_than_torch() -> None:
    torch.manual_seed(0)
    start = torch.randn(4096)
    ours, theirs, exact = nn.Parameter(start.clone()), nn.Parameter(start.clone()), nn.Parameter(start.double())
    numbers = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = [
        LowPrecisionSGD([ours], **numbers), torch.optim.SGD([theirs], **numbers), torch.optim.SGD([exact], **numbers)
    ]  # fmt: skip
    for _ in range(20):
        gradient = torch.randn(4096)
        ours.grad, theirs.grad, exact.grad = gradient, gradient.clone(), gradient.double()
        for optimizer in optimizers:
            optimizer.step()
    errors = [(each.detach().double() - exact.detach()).abs().mean() for each in (ours, theirs)]
    assert errors[0] <= 1.05 * errors[1] < 1e-6


def test_the_loss_scale_folds_in() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(50).to(torch.float32), torch.randn(50)
    ends = []
    for scale in (1.0, 1024.0):
        w = nn.Parameter(start.clone())
        optimizer = LowPrecisionSGD([w], lr=0.1, weight_decay=0.1, formats=DLFLOAT, loss_scale=scale)
        for _ in range(3):
            w.grad = gradient * scale
            optimizer.step()
        ends.append(w.detach())
    assert torch.equal(*ends)
    w.grad = gradient
    optimizer.param_groups[0]["loss_scale"] = 1000.0
    with pytest.raises(NotSupported, match="loss_scale must be a power of two"):
        optimizer.step()


def test_a_narrow_parameter_has_a_master_of_codes() -> None:
    """fp16 does not hold the range of 1-6-9: the master is a state of 2 bytes, and the parameter its nearest value."""
    w = nn.Parameter(torch.full((8,), 1e-3, dtype=torch.float16))
    optimizer = LowPrecisionSGD([w], lr=0.01, formats=UpdateFormats("dlfloat16", "1-5-2", rounding="stochastic"))
    for _ in range(5):
        w.grad = torch.ones(8, dtype=torch.float16)
        optimizer.step()
    state = optimizer.state[w]
    assert (state["master"].dtype, state["momentum_buffer"].dtype) == (torch.uint8, torch.uint8)
    assert state["master"].shape == (8, 2)
    assert w.max() < -0.01
    assert optimizer.bytes_per_parameter() == 5


def test_refuses_with_a_sentence() -> None:
    with pytest.raises(LpError, match=r"LowPrecisionSGD: lr does not fit\. Expected lr >= 0\. Got -1"):
        LowPrecisionSGD([nn.Parameter(torch.ones(1))], lr=-1)
    with pytest.raises(NotSupported, match=r"Expected fp32, bf16 or fp16\. Got torch.float64"):
        LowPrecisionSGD([nn.Parameter(torch.ones(1, dtype=torch.float64))])
    with pytest.raises(NotSupported, match="int8 cannot hold a weight or a moment"):
        UpdateFormats(master="int8")
