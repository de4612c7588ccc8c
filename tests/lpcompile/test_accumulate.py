"""Compiled models whose GEMMs add in 1-6-9, in all three roles, against loops of Fraction sums."""

import copy
import itertools
from fractions import Fraction

import pytest
import torch
import yaml
from torch import Tensor, nn

from lpcompile import Policy, advance, lpcompile, report
from runtime.numerics import quantize
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from tests.machine_facts import needs_kernels


def _nearest(x: Fraction, row: FloatFormat) -> Fraction:
    size, exponent = abs(x), row.emin
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    ulp = Fraction(2) ** (exponent - row.mantissa)
    rounded = min(round(size / ulp) * ulp, Fraction(row.max))  # Python rounds ties to even
    return rounded if x > 0 else -rounded


def _sum(terms: list[tuple[float, float]], chunk: int) -> float:
    row = get_format("1-6-9")
    assert isinstance(row, FloatFormat)
    total = Fraction(0)
    for start in range(0, len(terms), chunk):
        part = Fraction(0)
        for a, b in terms[start : start + chunk]:
            part = _nearest(part + Fraction(a) * Fraction(b), row)
        total = part if len(terms) <= chunk else _nearest(total + part, row)
    return float(total)


def _conv3x3(x: Tensor, w: Tensor, dy: Tensor | None = None) -> Tensor:
    """3 x 3, padding 1, stride 1, by loops: y, or with dy the gradient of w."""
    batch, channels, height, width = x.shape
    padded = torch.zeros(batch, channels, height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = x
    taps = list(itertools.product(range(3), range(3)))
    if dy is None:
        out = torch.zeros(batch, w.shape[0], height, width)
        for n, o, i, j in itertools.product(*map(range, out.shape)):
            terms = [
                (padded[n, c, i + r, j + s].item(), w[o, c, r, s].item()) for c in range(channels) for r, s in taps
            ]
            out[n, o, i, j] = _sum(terms, 64)
        return out
    out = torch.zeros(w.shape)
    places = list(itertools.product(range(batch), range(height), range(width)))
    for o, c, r, s in itertools.product(*map(range, w.shape)):
        terms = [(dy[n, o, i, j].item(), padded[n, c, i + r, j + s].item()) for n, i, j in places]
        out[o, c, r, s] = _sum(terms, 64)
    return out


def _policy(accumulate: str) -> Policy:
    how = f"accumulate: {accumulate}"
    text = (
        "rules:\n  - match: {op: [conv2d, linear]}\n"
        f"    fwd: {{x: e4m3, w: e4m3, {how}}}\n    bwd: {{dy: e5m2, w: e4m3, {how}}}\n"
        f"    grad: {{dy: e5m2, x: e4m3, {how}}}\n"
    )
    return Policy(name="sums", **yaml.safe_load(text))


def test_a_compiled_conv_net_sums_in_1_6_9() -> None:
    """Two convolutions and a relu: outputs and every gradient against loops of Fraction sums."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1, bias=False))
    first, second = net[0], net[2]
    w1, b1, w2 = (p.detach().clone() for p in (first.weight, first.bias, second.weight))
    x = torch.randn(2, 2, 6, 5, requires_grad=True)
    model = lpcompile(net, _policy("{format: 1-6-9, chunk: 64}"))
    y = model(x)
    assert {row.fidelity for row in report(model).gemms} == {"emulated"}
    dy = torch.randn(y.shape)
    y.backward(dy)

    def e4m3(t: Tensor) -> Tensor:
        return quantize(t.detach(), "e4m3")

    hidden = _conv3x3(e4m3(x), e4m3(w1)) + b1.view(-1, 1, 1)
    assert torch.equal(y.detach(), _conv3x3(e4m3(hidden.relu()), e4m3(w2)))
    dy5 = quantize(dy, "e5m2")
    flipped = e4m3(w2).flip(2, 3).transpose(0, 1)
    dhidden = _conv3x3(dy5, flipped) * (hidden > 0)
    dhidden5 = quantize(dhidden, "e5m2")
    assert torch.equal(second.weight.grad, _conv3x3(e4m3(hidden.relu()), w2, dy5))
    assert torch.equal(first.weight.grad, _conv3x3(e4m3(x), w1, dhidden5))
    assert torch.equal(first.bias.grad, dhidden.sum((0, 2, 3)))
    assert x.grad is not None
    assert torch.equal(x.grad, _conv3x3(dhidden5, e4m3(w1).flip(2, 3).transpose(0, 1)))


def test_stochastic_sums_follow_the_clock_of_the_model() -> None:
    """The bits come from the model's RunState: the same again at the same step, others at the next, in every role."""
    how = "{format: 1-6-9, chunk: 64, rounding: stochastic, product: rounded}"

    def run(step: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        model = lpcompile(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3), nn.Linear(4, 3)), _policy(how))
        for _ in range(step):
            advance(model)
        inputs = torch.randn(1, 2, 8, 8, requires_grad=True)
        y = model(inputs)
        y.sum().backward()
        assert inputs.grad is not None
        return y.detach(), inputs.grad

    again, later = run(0), run(1)
    assert all(torch.equal(one, other) for one, other in zip(run(0), again))
    assert not torch.equal(again[0], later[0])
    assert not torch.equal(again[1], later[1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.tensor([[_sum(list(zip(row.tolist(), column.tolist())), 64) for column in b.t()] for row in a])


def test_a_compiled_linear_layer_sums_in_1_6_9() -> None:
    """All three GEMMs of a layer; FWD and GRAD have two chunks."""
    torch.manual_seed(0)
    layer = nn.Linear(66, 3, bias=False)
    w = quantize(layer.weight.detach(), "e4m3")
    x = torch.randn(66, 66, requires_grad=True)
    model = lpcompile(layer, _policy("{format: 1-6-9, chunk: 64}"))
    y = model(x)
    dy = torch.randn(y.shape)
    y.backward(dy)
    x8, dy8 = quantize(x.detach(), "e4m3"), quantize(dy, "e5m2")
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert torch.equal(y.detach(), _product(x8, w.t()))
    assert torch.equal(x.grad, _product(dy8, w))
    assert torch.equal(layer.weight.grad, _product(dy8.t(), x8))


@pytest.mark.parametrize(
    "without_kernels", [pytest.param(False, marks=needs_kernels), True], ids=["a kernel", "the reference"]
)
def test_an_output_padding_of_a_stride(without_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Legal where the dilation is larger: dy has room for one position more than x has. Small integers are exact."""
    if without_kernels:
        monkeypatch.setattr("runtime.kernels.cpu.accumulate.accumulate_library", lambda: None)
        monkeypatch.setattr("runtime.kernels.cpu.accumulate_wide.wide_library", lambda: None)
    torch.manual_seed(0)
    text = "rules:\n  - match: {name: '*'}\n" + "".join(
        f"    {name}: {{{', '.join(f'{each}: e4m3' for each in operands)}, accumulate: 1-6-9}}\n"
        for name, operands in (("fwd", "xw"), ("bwd", ("dy", "w")), ("grad", ("dy", "x")))
    )
    layer = nn.ConvTranspose1d(3, 2, 3, dilation=2, output_padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-2, 3, layer.weight.shape))
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
    wanted = copy.deepcopy(layer)
    x = torch.randint(-3, 4, (2, 3, 5)).float()
    lpcompile(layer, Policy(name="sums", **yaml.safe_load(text)), strict=True)
    assert ({row.backend for row in report(layer).gemms} == {"reference"}) is without_kernels
    found = []
    for each in (layer, wanted):
        given = x.clone().requires_grad_()
        y = each(given)
        y.backward(torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).float())
        found.append((y, given.grad, each.weight.grad, each.bias.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found))
