"""`out` is the last step and rounds once; under autocast a compiled layer gives the dtype that torch's gives."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile
from runtime.numerics import quantize
from runtime.numerics.scaling import compute_scale, expand_scale
from runtime.numerics.specs import QuantSpec
from tests.machine_facts import HAS_BF16_LSTM

SCALES = {"row": "{granularity: row}", "tensor": "{granularity: tensor}", "none": ""}


def _policy(folder: Path, granularity: str, out: str) -> Path:
    def cast(format: str, along: str = granularity) -> str:
        scale = {"column": "{granularity: column}"}.get(along, SCALES.get(along, ""))
        return f"{{format: {format}" + (f", scale: {scale}}}" if scale else "}")

    other = "column" if granularity == "row" else granularity
    file = folder / "out.yaml"
    file.write_text(
        f"version: 1\nrules:\n  - match: {{name: '*'}}\n"
        f"    fwd: {{x: {cast('e4m3')}, w: {cast('e4m3')}, out: {out}}}\n"
        f"    bwd: {{dy: {cast('e5m2')}, w: {cast('e4m3', other)}, out: {out}}}\n"
    )
    return file


def _cast(x: Tensor, granularity: str, format: str = "e4m3") -> Tensor:
    """The cast values in float64, by the oracle."""
    scale = "" if granularity == "none" else f" {granularity}/amax"
    spec = QuantSpec.parse(f"{format} nearest_even{scale}")
    s = compute_scale(x, spec)
    if s is None:
        return quantize(x, format).double()
    wide = expand_scale(s, x.shape, spec)
    return quantize(x / wide, format).double() * wide.double()


@pytest.mark.parametrize("out", ["bf16", "fp16", "e5m2"])
@pytest.mark.parametrize("granularity", ["row", "tensor", "none"])
def test_out_rounds_the_scaled_sum_with_its_bias_once(tmp_path: Path, granularity: str, out: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 96)
    x, dy = torch.randn(128, 64, requires_grad=True), torch.randn(128, 96)
    exact = (
        _cast(x.detach(), granularity) @ _cast(layer.weight.detach(), granularity).t() + layer.bias.detach().double()
    )
    other = "column" if granularity == "row" else granularity
    exact_dx = _cast(dy, granularity, "e5m2") @ _cast(layer.weight.detach(), other)
    y = lpcompile(layer, _policy(tmp_path, granularity, out))(x)
    y.backward(dy)
    assert x.grad is not None
    for got, wanted in ((y.detach(), exact), (x.grad, exact_dx)):
        assert torch.equal(got, quantize(got, out)), "every value is on the grid of `out`"
        same = (got == quantize(wanted.float(), out)).double().mean()
        assert same > 0.99, f"{same:.3f} equal one rounding; sums in fp32 move a few over an edge"


def test_out_of_convolutions_rounds_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3)
    x = torch.randn(2, 4, 8, 8)
    w = layer.weight.detach()
    exact = nn.functional.conv2d(_cast(x, "tensor"), _cast(w, "tensor"), layer.bias.detach().double())
    y = lpcompile(layer, _policy(tmp_path, "tensor", "bf16"))(x).detach()
    assert torch.equal(y, y.bfloat16().float())
    assert (y == exact.bfloat16().float()).double().mean() > 0.99


@pytest.mark.parametrize("bias", [False, True])
def test_the_bf16_policy_gives_what_autocast_gives(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=bias), nn.ReLU(), nn.Linear(96, 8, bias=bias))
    for each in (model[0], model[2]) if bias else ():  # autocast rounds it first
        each.bias.data = each.bias.data.bfloat16().float()
    x = torch.randn(32, 64)
    original = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = original(x)
    assert torch.equal(lpcompile(model, "bf16")(x), wanted.float())


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x)[0]
        return y


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)[0]
        return y


class _Step(nn.Module):
    """The hidden state of a cell, whose other inputs autocast leaves as they are."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.inner = kind(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        first: Tensor = y[0] if isinstance(y, tuple | list) else y
        return first


LAYERS = {
    "linear": (lambda: nn.Linear(16, 16), (2, 3, 16)),
    "conv": (lambda: nn.Conv2d(16, 16, 3), (2, 16, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(16, 16, 3), (2, 16, 5)),
    "attention": (_Attention, (2, 3, 16)),
    "lstm": (_Recurrent, (2, 3, 16)),
}


@pytest.mark.parametrize("policy", ["hfp8", "fp8-rowwise", "int8", "bf16", "fp32-emulated"])
@pytest.mark.parametrize("layer", list(LAYERS))
@pytest.mark.filterwarnings("ignore::runtime.errors.LpWarning")
def test_autocast_gives_its_dtype(layer: str, policy: str) -> None:
    if layer == "lstm" and not HAS_BF16_LSTM:
        pytest.skip("torch's own LSTM does not run in bf16 here")
    make, shape = LAYERS[layer]
    original, x = make(), torch.randn(shape, requires_grad=True)
    compiled = lpcompile(copy.deepcopy(original), policy)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, y = original(x), compiled(x)
    assert y.dtype == wanted.dtype == torch.bfloat16
    into = torch.zeros_like(wanted)
    into[[0]] = y[:1]
    into.index_add_(0, torch.tensor([0]), y[:1])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in compiled.parameters())
    assert compiled(x).dtype == torch.float32


@pytest.mark.parametrize("policy", ["hfp8", "fp8-rowwise", "int8", "bf16", "fp32-emulated"])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.filterwarnings("ignore::runtime.errors.LpWarning")
def test_cells_give_the_dtype_that_torchs_do_under_autocast(kind: type[nn.Module], policy: str) -> None:
    original, x = _Step(kind), torch.randn(2, 16, requires_grad=True)
    compiled = lpcompile(copy.deepcopy(original), policy)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, y = original(x), compiled(x)
    assert y.dtype == wanted.dtype
    y.sum().backward()
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in compiled.parameters())


class _Mixed(nn.Module):
    """A convolution whose input is a product's result, in the dtype of autocast, and its weight is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.linear(x)) @ x.mT
        return y


@pytest.mark.parametrize("policy", ["hfp8", "fp32-emulated"])
@pytest.mark.filterwarnings("ignore::runtime.errors.LpWarning")
def test_compiled_code_under_autocast_is_eager_code(policy: str) -> None:
    torch._dynamo.reset()
    original, x = _Mixed(), torch.randn(2, 4, 8, requires_grad=True)
    model = lpcompile(copy.deepcopy(original), policy)
    runs = (original, model, torch.compile(model, backend="aot_eager"))
    results = []
    for run in runs:
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        weights = (original if run is original else model).parameters()
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *weights])])
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2]))
    assert all(a.dtype == b.dtype for a, b in zip(*results[:2]))
    if policy == "fp32-emulated":
        assert all(torch.equal(a, b) for a, b in zip(*results[:2]))


@pytest.mark.parametrize("policy", ["bf16", "fp32-emulated", "int8"])
def test_gru_keeps_the_dtype_of_its_state_as_torchs_does(policy: str) -> None:
    x = torch.randn(2, 3, 8)
    for kind in (nn.GRU, nn.RNN):
        layer = kind(8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = layer(x)
            found = lpcompile(layer, policy)(x)
        assert [each.dtype for each in found] == [each.dtype for each in wanted], kind
