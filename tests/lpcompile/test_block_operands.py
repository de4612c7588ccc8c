"""Block formats and lookup formats as GEMM operands of compiled models: outputs and every gradient against float64
products of the oracle's casts, made from transposed tensors where the sum runs down the columns.
"""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lpcompile import Policy, advance, lpcompile, report
from lpcompile.api import run_state
from lpcompile.compiled import get_compiled
from runtime.numerics import quantize
from runtime.numerics.block_casts import quantize_blocks
from runtime.numerics.block_formats import default_rounding
from runtime.numerics.scaling import compute_scale
from runtime.numerics.specs import LayerSpec, QuantSpec, ScaleSpec
from runtime.ops.layer import cast

BLOCKS = ("mxfp8", "mxfp8-e5m2:scale=rceil", "mxfp6", "mxfp4", "mxint8", "nvfp4")
TOKENS, IN, OUT = (3, 25), 70, 45  # ragged blocks along every sum


def policy(fwd: str, bwd: str, **operand: object) -> Policy:
    def one(name: str) -> object:
        return {"format": name, **operand} if operand else name

    rule = {
        "fwd": {"x": one(fwd), "w": one(fwd)},
        "bwd": {"dy": one(bwd), "w": one(fwd)},
        "grad": {"dy": one(bwd), "x": one(fwd)},
    }
    return Policy.model_validate({"rules": [rule]})


def rows(x: Tensor, name: str) -> Tensor:
    """The oracle's cast with blocks along the last dim, in float64."""
    return quantize_blocks(x, name).double()


def columns(x: Tensor, name: str) -> Tensor:
    """The oracle's cast with blocks down the last two dims' columns."""
    return quantize_blocks(x.transpose(-1, -2).contiguous(), name).transpose(-1, -2).double()


def check(got: Tensor, a: Tensor, b: Tensor) -> None:
    """got is a b within the bound of fp32 sums, an fp32 rounding of nvfp4's 1/S on each side included."""
    bound = (a.abs() @ b.abs()) * (a.shape[-1] + 6) * 2.0**-24
    assert ((got.double() - a @ b).abs() <= bound + 1e-37).all()
    assert bool((got != 0).any())


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


def data(*shape: int, seed: int) -> Tensor:
    """Rows of different sizes, so that a block down a column is not a block along a row."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-3, 4, shape, generator=generator).float())
    return torch.randn(shape, generator=generator) * size


@pytest.mark.parametrize("bwd", ["same", "mxfp8-e5m2"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["linear", "linear_kn"])
def test_a_layer(kind: str, name: str, bwd: str) -> None:
    bwd = name if bwd == "same" else bwd
    layer = nn.Linear(IN, OUT, bias=False) if kind == "linear" else Conv1D(OUT, IN)
    weight = layer.weight
    weight.data.copy_(data(*weight.shape, seed=1))
    model = lpcompile(nn.Sequential(layer), policy(name, bwd), strict=True)
    x, dy = data(*TOKENS, IN, seed=2).requires_grad_(), data(*TOKENS, OUT, seed=3)
    y = model(x)
    y.backward(dy)
    x_MK, dy_MN, w_NK = x.detach().view(-1, IN), dy.view(-1, OUT), weight.detach()
    w_NK = w_NK if kind == "linear" else w_NK.t()
    check(y.view(-1, OUT), rows(x_MK, name), rows(w_NK, name).t())
    assert x.grad is not None
    check(x.grad.view(-1, IN), rows(dy_MN, bwd), columns(w_NK, name))
    assert weight.grad is not None
    dw_NK = weight.grad if kind == "linear" else weight.grad.t()
    check(dw_NK, columns(dy_MN, bwd).t(), columns(x_MK, name))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("b_shape", [(3, 70, 33), (70, 33)])
def test_a_product_of_activations(name: str, b_shape: tuple[int, ...]) -> None:
    a, b = data(3, 25, 70, seed=4).requires_grad_(), data(*b_shape, seed=5).requires_grad_()
    dy = data(3, 25, 33, seed=6)
    model = lpcompile(Product(), policy(name, name), example_inputs=(a, b), strict=True)
    y = model(a, b)
    y.backward(dy)
    qa, qb = a.detach(), b.detach()
    check(y, rows(qa, name), columns(qb, name))
    assert a.grad is not None
    assert b.grad is not None
    check(a.grad, rows(dy, name), rows(qb, name).transpose(-1, -2))
    left, right = columns(qa, name), columns(dy, name)
    if b.dim() == 2:  # one sum over all matrices of the batch
        left, right = left.reshape(-1, 70), right.reshape(-1, 33)
    check(b.grad, left.transpose(-1, -2), right)


def laid(model: nn.Module) -> LayerSpec:
    """The spec of the one product of a compiled layer, as its operands lie in memory."""
    return get_compiled(model).phase.products["0"].spec


def test_the_compiler_lays_the_blocks_along_the_sum() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(IN, OUT)), policy("mxfp8", "nvfp4"), strict=True)
    assert str(laid(model)) == (
        "fwd: mxfp8 nearest_even row * mxfp8 nearest_even row -> fp32 -> fp32; "
        "bwd: nvfp4 nearest_even row * mxfp8 nearest_even column -> fp32 -> fp32; "
        "grad: nvfp4 nearest_even column * mxfp8 nearest_even column -> fp32 -> fp32"
    )
    model = lpcompile(nn.Sequential(Conv1D(OUT, IN)), policy("mxfp4:scale=even", "nvfp4"), strict=True)
    assert [laid(model).fwd.rhs.along, laid(model).bwd.rhs.along] == ["column", "row"]


def test_what_the_report_says() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(IN, OUT)), policy("mxfp8", "nvfp4"), strict=True)
    for row in report(model).gemms:
        assert row.rhs == "mxfp8 nearest_even"
        if row.backend == "cpu":  # a block scale may be anything in fp32's range
            assert row.fidelity == "bounded"
            assert "below 2^-126 count as 0" in row.reason
    only = lpcompile(nn.Sequential(nn.Linear(IN, OUT)), policy("nvfp4", "nvfp4"), strict=True)
    assert {row.fidelity for row in report(only).gemms} == {"format-exact"}


def test_stochastic_gradients_in_blocks_repeat_and_differ() -> None:
    rule = {
        "fwd": {"x": "mxfp4", "w": "mxfp4"},
        "bwd": {"dy": {"format": "mxfp4", "rounding": "stochastic"}, "w": "mxfp4"},
        "grad": {"dy": {"format": "mxfp4", "rounding": "stochastic"}, "x": "mxfp4"},
    }
    model = lpcompile(nn.Sequential(nn.Linear(64, 64)), Policy.model_validate({"rules": [rule]}), strict=True)
    x = data(32, 64, seed=7)

    def gradient(dy: Tensor) -> Tensor:
        model.zero_grad()
        model(x).backward(dy)
        assert model[0].weight.grad is not None
        return model[0].weight.grad.clone()

    dy = data(32, 64, seed=8)
    first = gradient(dy)
    second = gradient(dy)  # the next micro-batch
    advance(model, 0)
    assert torch.equal(gradient(dy), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_convolution_is_refused_with_what_works(name: str) -> None:
    model = lpcompile(nn.Sequential(nn.Conv2d(3, 4, 3)), policy(name, name))
    reasons = {row.reason for row in report(model).gemms if row.fidelity == "refused"}
    assert len(reasons) == 1
    assert "use a scalar format such as e4m3, with a scale of granularity tensor" in reasons.pop()


def test_values_below_the_range_of_bf16_are_kept_in_fp32() -> None:
    spec, x = QuantSpec("mxfp8"), data(4, 64, seed=9)
    assert cast(x, spec, None, 0, 0).grid.dtype == torch.bfloat16
    tiny = cast(x * 2.0**-132, spec, None, 0, 0).grid
    assert tiny.dtype == torch.float32
    assert torch.equal(tiny, quantize_blocks(x * 2.0**-132, "mxfp8"))


def test_nan_reaches_the_gradient_and_counts_as_overflow() -> None:
    loaded = policy("mxfp8", "mxfp8").model_copy(update={"loss_scale": Policy.model_validate(
        {"loss_scale": {"kind": "dynamic"}}).loss_scale})  # fmt: skip
    model = lpcompile(nn.Sequential(nn.Linear(64, 64)), loaded, strict=True)
    state, x = run_state(model), data(4, 64, seed=10)
    assert state is not None
    model(x).backward(data(4, 64, seed=11) * 1e30)  # scaled into range, block by block
    assert not state.overflow
    dy = data(4, 64, seed=11)
    dy[1, 2] = torch.inf
    model(x).backward(dy)
    assert state.overflow
    assert bool(model[0].weight.grad.isnan().any())


@pytest.mark.parametrize("name", ["nf4", "pow2:bits=4,max=0", "fp4-radix4"])
def test_lookup_formats_with_a_scale(name: str) -> None:
    layer = nn.Linear(IN, OUT, bias=False)
    model = lpcompile(nn.Sequential(layer), policy(name, name, scale={"granularity": "tensor"}), strict=True)
    x, dy = data(25, IN, seed=12).requires_grad_(), data(25, OUT, seed=13)
    y = model(x)
    y.backward(dy)

    def value(t: Tensor) -> Tensor:
        s = compute_scale(t, QuantSpec(name, default_rounding(name), ScaleSpec()))
        assert s is not None
        return quantize(t / s, name).double() * s.double()

    check(y, value(x.detach()), value(layer.weight.detach()).t())
    assert x.grad is not None
    assert layer.weight.grad is not None
    check(x.grad, value(dy), value(layer.weight.detach()))
    check(layer.weight.grad, value(dy).t(), value(x.detach()))
