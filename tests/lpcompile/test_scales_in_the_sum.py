"""Scales that vary along the sum: groups and tiles of weights, one per output channel of a convolution; and what is
refused, by the operand's own name.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile import Policy, lpcompile, report
from runtime.numerics import get_format, quantize


def scaled(format: str, **scale: Any) -> dict[str, Any]:
    return {"format": format, "scale": scale}


def compiled(layer: nn.Module, **roles: Any) -> nn.Module:
    return lpcompile(layer, Policy(name="p", rules=({**roles},)), strict=True)  # type: ignore[arg-type]


def tiled(w: Tensor, format: str, rows: int, columns: int) -> Tensor:
    """w with one amax scale per tile, in float64 from fp32 scales and grid values, tile by tile."""
    out = torch.empty(w.shape, dtype=torch.float64)
    for top in range(0, w.shape[0], rows):
        for left in range(0, w.shape[1], columns):
            tile = w[top : top + rows, left : left + columns]
            scale = (tile.abs().amax().double() / get_format(format).max).float()
            grid = quantize(tile / scale, format)
            out[top : top + rows, left : left + columns] = grid.double() * scale.double()
    return out


def close(got: Tensor, wanted: Tensor, size: Tensor) -> None:
    """Within the roundings of fp32: a sum of K products, and two more of each operand."""
    assert ((got.double() - wanted).abs() <= 1e-5 * size + 1e-30).all()


@pytest.mark.parametrize(
    ("format", "block"),
    [("int4", (1, 32)), ("nf4", (1, 64)), ("e2m1", (16, 16)), ("e4m3", (128, 128)), ("e4m3", (1, 48))],
)
@pytest.mark.parametrize("is_conv1d", [False, True])
def test_weights_in_groups_and_tiles(format: str, block: tuple[int, int], is_conv1d: bool) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5, 96, requires_grad=True), torch.randn(40, 96) * 0.1
    if is_conv1d:
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        layer = conv1d(40, 96)
        layer.weight.data.copy_(w.t())
    else:
        layer = nn.Linear(96, 40, bias=False)
        layer.weight.data.copy_(w)
    operand = scaled(format, granularity="block", block=block)
    model = compiled(layer, fwd={"x": "fp32", "w": operand}, bwd={"dy": "fp32", "w": operand})
    y, dy = model(x), torch.randn(5, 40)
    y.backward(dy)
    seen = tiled(w, format, *block)
    close(y, x.double() @ seen.t(), x.double().abs() @ seen.abs().t())
    close(x.grad, dy.double() @ seen, dy.double().abs() @ seen.abs())  # type: ignore[arg-type]
    dw = layer.weight.grad.t() if is_conv1d else layer.weight.grad
    close(dw, dy.double().t() @ x.detach().double(), dy.double().abs().t() @ x.detach().double().abs())
    assert {row.fidelity for row in report(model).gemms if row.role != "grad"} == {"bounded"}


def test_activations_in_lanes_of_128_and_weights_in_tiles() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(6, 256) * 10, nn.Linear(256, 130, bias=False)
    lane, tile = (scaled("e4m3", granularity="block", block=block) for block in ((1, 128), (128, 128)))
    model = compiled(layer, fwd={"x": lane, "w": tile})
    xs, ws = tiled(x, "e4m3", 1, 128), tiled(layer.weight.detach(), "e4m3", 128, 128)
    close(model(x), xs @ ws.t(), xs.abs() @ ws.abs().t())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_scale_per_output_channel_of_a_convolution(dims: int, groups: int) -> None:
    torch.manual_seed(0)
    kind, function = (
        (nn.Conv1d, torch.conv1d), (nn.Conv2d, torch.conv2d), (nn.Conv3d, torch.conv3d),
    )[dims - 1]  # fmt: skip
    layer = kind(4, 8, 3, padding=1, groups=groups)
    layer.weight.data *= torch.logspace(-2, 2, 8).view(-1, *(1,) * (dims + 1))
    w = layer.weight.detach().clone()
    operand = scaled("int8", granularity="channel")
    model = compiled(layer, fwd={"x": scaled("int8"), "w": operand}, bwd={"dy": "fp32", "w": operand})
    x = torch.randn(2, 4, *(5,) * dims, requires_grad=True)
    y = model(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    step = x.detach().abs().amax() / 127
    xs = (quantize(x.detach() / step, "int8").double() * step.double()).requires_grad_()
    steps = (w.abs().flatten(1).amax(1) / 127).view(-1, *(1,) * (dims + 1))
    ws = quantize(w / steps, "int8").double() * steps.double()
    assert (ws - w).abs().amax() > 0
    wanted = function(xs, ws, layer.bias.detach().double(), padding=1, groups=groups)
    size = function(xs.abs(), ws.abs(), layer.bias.detach().double().abs(), padding=1, groups=groups)
    close(y, wanted, size)
    (dx,) = torch.autograd.grad(wanted, xs, dy.double())
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-5, atol=1e-4)  # type: ignore[union-attr]
    (row, backward, _) = report(model).gemms
    assert (row.fidelity, backward.fidelity) == ("format-exact", "bounded")


def test_channel_of_a_linear_layer_is_its_output_feature() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    layers = [nn.Linear(16, 8), nn.Linear(16, 8)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, granularity in zip(layers, ("channel", "row")):
        compiled(layer, fwd={"x": scaled("int8", granularity="row"), "w": scaled("int8", granularity=granularity)})
    assert torch.equal(layers[0](x), layers[1](x))


def test_channel_of_b_is_a_column() -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    a, b = torch.randn(3, 16), torch.randn(16, 8)
    rule = {"fwd": {"a": "fp32", "b": scaled("int8", granularity="channel")}}
    model = lpcompile(Product(), Policy(name="p", rules=(rule,)), (a, b), strict=True)  # type: ignore[arg-type]
    steps = b.abs().amax(0) / 127
    seen = quantize(b / steps, "int8").double() * steps.double()
    close(model(a, b), a.double() @ seen, a.double().abs() @ seen.abs())


def refusals(layer: nn.Module, **roles: Any) -> dict[str, str]:
    model = lpcompile(layer, Policy(name="p", rules=({**roles},)))  # type: ignore[arg-type]
    return {row.role: row.reason for row in report(model).gemms if row.fidelity == "refused"}


def test_a_refusal_names_the_operand_as_the_file_does() -> None:
    row = scaled("int8", granularity="row")
    reason = refusals(nn.Conv2d(4, 8, 3), fwd={"w": row})["fwd"]
    assert reason == (
        "fwd w: a scale per row varies along the sum of a conv2d, whose rows are lines of pixels; "
        "use granularity channel or tensor"
    )
    assert refusals(nn.Linear(4, 8), bwd={"w": row})["bwd"].startswith("bwd w: a scale per row varies")
    assert refusals(nn.Linear(4, 8), grad={"dy": row})["grad"].startswith("grad dy: a scale per row varies")
    channel = scaled("int8", granularity="channel")
    assert "has no dim that is its output channels" in refusals(nn.ConvTranspose2d(4, 8, 3), fwd={"w": channel})["fwd"]
    tile = scaled("int8", granularity="block")
    told = refusals(nn.Linear(4, 8), fwd={"x": row, "w": tile, "accumulate": "int32"})["fwd"]
    assert told.startswith("fwd w: a scale per block varies along the sum and is multiplied into the values before it")


def test_torch_compile_has_the_same_bits() -> None:
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 32, bias=False)), torch.randn(2, 3, 5, 5)
    rules = (
        {"match": {"op": "conv2d"}, "fwd": {"x": scaled("int8"), "w": scaled("int8", granularity="channel")}},
        {"fwd": {"w": scaled("int4", granularity="block", block=(1, 24))}},
    )
    model = lpcompile(layer, Policy(name="p", rules=rules), strict=True)  # type: ignore[arg-type]
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_a_transposed_convolution_says_what_it_takes() -> None:
    reason = refusals(nn.ConvTranspose2d(4, 8, 3), fwd={"w": scaled("int8", granularity="row")})["fwd"]
    assert reason.endswith("of a conv_transpose2d, whose rows are lines of pixels; use granularity tensor")


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(4, 8, 3)])
@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_a_convolution_has_no_scale_per_line_of_pixels_of_any_rule(layer: nn.Module, granularity: str) -> None:
    scale = scaled("e4m3", granularity=granularity, rule="pow2")
    found = refusals(layer, fwd={"x": scale}, bwd={"w": scale}, grad={"dy": scale})
    assert sorted(found) == ["bwd", "fwd", "grad"]
    assert all("whose rows are lines of pixels; use granularity" in each for each in found.values())
    kept = scaled("e4m3", granularity="tensor", rule="pow2")
    assert not refusals(layer, fwd={"x": kept}, bwd={"w": kept}, grad={"dy": kept})


def test_a_channel_of_rule_pow2_runs_in_both_directions_of_a_convolution() -> None:
    scale = scaled("e4m3", granularity="channel", rule="pow2")
    assert not refusals(nn.Conv2d(4, 8, 3), fwd={"w": scale}, bwd={"w": scale})
