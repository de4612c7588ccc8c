# ruff: noqa: E501
"""cancel-casts as text, and the bits of what it leaves."""

import pytest
import torch

from passes.manager import parse_passes
from passes.pipelines import PASSES
from runtime.numerics.formats import FORMATS
from runtime.ops.dialect import OPS
from tests.passes.golden import check, run

_GRID = '!lp.quant<"e4m3", "{}", none, tensor<4x8xbf16>>'


def _program(body: str, result: str = _GRID.format("none"), inputs: str = "%x : tensor<4x8xf32>") -> str:
    return f"""
"builtin.module"() ({{
  "torch.graph"() <{{sym_name = "m#0", path = "m", kind = "module"}}> ({{
  ^bb0({inputs}):
    {body}
    "torch.return"(%c) : ({result}) -> ()
  }}) : () -> ()
}}) : () -> ()
"""


def _quantize(
    name: str, x: str, spec: str = "e4m3 nearest_even", kind: str = "tensor<4x8xf32>", scale: str = ""
) -> str:
    granularity = "tensor" if scale else "none"
    operands, kinds = (f"{x}, {scale}", f"{kind}, tensor<f32>") if scale else (x, kind)
    given = '["x", "s"]' if scale else '["x"]'
    return f'{name} = "lp.quantize"({operands}) {{spec = "{spec}", site = 0, slot = 0, operands = {given}}} : ({kinds}) -> {_GRID.format(granularity)}'


def _dequantize(name: str, q: str, spec: str = "e4m3 nearest_even", scale: str = "") -> str:
    granularity = "tensor" if scale else "none"
    operands, kinds = (
        (f"{q}, {scale}", f"{_GRID.format(granularity)}, tensor<f32>") if scale else (q, _GRID.format(granularity))
    )
    given = '["q", "s"]' if scale else '["q"]'
    return (
        f'{name} = "lp.dequantize"({operands}) {{spec = "{spec}", operands = {given}}} : ({kinds}) -> tensor<4x8xf32>'
    )


_RELU = '%r = "torch.call_function"({}) {{target = "torch.relu"}} : ({}) -> {}'


def test_a_cast_of_a_dequantized_cast_is_that_cast() -> None:
    text = _program("\n    ".join([_quantize("%q", "%x"), _dequantize("%d", "%q"), _quantize("%c", "%d")]))
    check(
        run(text, "cancel-casts"),
        """
// CHECK:      %q = "lp.quantize"(%x)
// CHECK-NEXT: "torch.return"(%q)
// CHECK-NOT:  lp.dequantize
""",
    )


def test_what_lies_between_place_regions_moves_away_first() -> None:
    view = '%v = "torch.call_function"(%d) {target = "torch.Tensor.reshape", args = "_, 4, 8"} : (tensor<4x8xf32>) -> tensor<4x8xf32>'
    text = _program("\n    ".join([_quantize("%q", "%x"), _dequantize("%d", "%q"), view, _quantize("%c", "%v")]))
    assert run(text, "cancel-casts").count('"lp.quantize"') == 2
    check(
        run(text, "place-regions,cancel-casts"),
        """
// CHECK:      %q = "lp.quantize"(%x)
// CHECK-NEXT: [[V:%[a-z0-9_]+]] = "torch.call_function"(%q) {target = "torch.Tensor.reshape", args = "_, 4, 8"} : {{.*}} -> tensor<4x8xbf16>
// CHECK-NEXT: "torch.return"([[V]])
""",
    )


def test_a_relu_of_casts_is_not_cast_again() -> None:
    grid, kept = _GRID.format("none"), "tensor<4x8xbf16>"
    relu = _RELU.format("%q", grid, kept)
    text = _program("\n    ".join([_quantize("%q", "%x"), relu, _quantize("%c", "%r", kind=kept)]))
    check(run(text, "cancel-casts"), '// CHECK: %r = "torch.call_function"(%q)\n// CHECK-NEXT: "torch.return"(%r)')


_OTHER = {
    "another format": _quantize("%c", "%d", "e4m3 toward_zero"),
    "stochastic": _quantize("%c", "%d", "e4m3 stochastic"),
}


@pytest.mark.parametrize("what", _OTHER)
def test_another_cast_stays(what: str) -> None:
    spec = "e4m3 stochastic" if what == "stochastic" else "e4m3 nearest_even"
    text = _program("\n    ".join([_quantize("%q", "%x", spec), _dequantize("%d", "%q", spec), _OTHER[what]]))
    assert run(text, "cancel-casts").partition("torch.graph")[2] == run(text, "").partition("torch.graph")[2]


@pytest.mark.parametrize(("scaled", "num_left"), [("false", 2), ("true", 1)])
def test_with_one_scale_for_both_only_if_told(scaled: str, num_left: int) -> None:
    spec = "e4m3 nearest_even tensor/amax"
    scale = f'%s = "lp.scale"(%x) {{spec = "{spec}"}} : (tensor<4x8xf32>) -> tensor<f32>'
    casts = [_quantize("%q", "%x", spec, scale="%s"), _dequantize("%d", "%q", spec, scale="%s")]
    text = _program("\n    ".join([scale, *casts, _quantize("%c", "%d", spec, scale="%s")]), _GRID.format("tensor"))
    assert run(text, f"cancel-casts{{scaled={scaled}}}").count('"lp.quantize"') == num_left
    assert str(parse_passes(f"cancel-casts{{scaled={scaled}}}", PASSES)[0]) == f"cancel-casts{{scaled={scaled}}}"


def test_two_scales_are_two_casts() -> None:
    spec = "e4m3 nearest_even tensor/amax"
    scales = [
        f'%{n} = "lp.scale"({x}) {{spec = "{spec}"}} : (tensor<4x8xf32>) -> tensor<f32>'
        for n, x in (("s", "%x"), ("t", "%d"))
    ]
    casts = [_quantize("%q", "%x", spec, scale="%s"), _dequantize("%d", "%q", spec, scale="%s")]
    text = _program(
        "\n    ".join([scales[0], *casts, scales[1], _quantize("%c", "%d", spec, scale="%t")]), _GRID.format("tensor")
    )
    assert run(text, "cancel-casts{scaled=true}").count('"lp.quantize"') == 2


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("fp32", "int1")])
@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
def test_a_grid_value_is_its_own_cast(format: str, rounding: str) -> None:
    """NaN, both zeros and what saturated too."""
    quantize, dequantize = OPS["lp.quantize"].run, OPS["lp.dequantize"].run
    edges = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-30, -1e-30, 3e38])
    x = torch.cat([edges, torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10])
    spec = f"{format} {rounding}"
    q = quantize(x, None, None, spec=spec, site=0, slot=0)
    again = quantize(dequantize(q, None, spec=spec), None, None, spec=spec, site=0, slot=0)
    assert again.dtype == q.dtype
    assert torch.equal(again.nan_to_num(0.5), q.nan_to_num(0.5))
    assert torch.equal(again.isnan(), q.isnan())
    assert torch.equal(again.signbit() & ~again.isnan(), q.signbit() & ~q.isnan())


@pytest.mark.parametrize("format", ["e4m3", "e5m2", "int8", "int4", "bf16", "dlfloat16"])
def test_a_scaled_grid_value_rounds_back_in_the_normal_range(format: str) -> None:
    quantize, dequantize = OPS["lp.quantize"].run, OPS["lp.dequantize"].run
    spec = f"{format} nearest_even tensor/amax"
    for exponent in range(-90, 120, 10):
        x = torch.randn(2000, generator=torch.Generator().manual_seed(exponent)) * 2.0**exponent
        scale = OPS["lp.scale"].run(x, spec=spec)
        q = quantize(x, scale, None, spec=spec, site=0, slot=0)
        again = quantize(dequantize(q, scale, spec=spec), scale, None, spec=spec, site=0, slot=0)
        assert torch.equal(again, q), exponent
