# ruff: noqa: E501
"""place-regions as text: where a cast moves, and what keeps it where it is."""

import pytest

from passes.analysis.traffic import traffic
from passes.ir.parser import parse_program
from passes.manager import parse_passes
from passes.pipelines import PASSES
from runtime.errors import PassError
from tests.passes.golden import check, run
from tests.passes.programs_for_tests import E4M3, SCALED, convolutions, layer, reshaped_layers, two_layers

_CAST = "annotate,insert-casts,share-casts"
_DROP, _KEEP = f"{_CAST},place-regions{{carriers=drop}}", f"{_CAST},place-regions{{carriers=keep}}"
_TENSOR = "int8 nearest_even tensor/amax"


def _bytes(text: str) -> tuple[int, int]:
    found = traffic(parse_program(text))
    return found.casts, found.bytes


def test_relu_and_max_pool_run_on_grid_values_and_the_convolution_gets_a_stand_in() -> None:
    text = convolutions()
    check(
        run(text, _DROP),
        """
// CHECK:      [[A:%[a-z0-9_]+]] = "lp.gemm"(%x, %wa
// CHECK-NEXT: [[Q:%[a-z0-9_]+]] = "lp.quantize"([[A]]) {spec = "e4m3 nearest_even"{{.*}} -> !lp.quant<"e4m3", "none", none, tensor<2x4x8x8xbf16>>
// CHECK-NEXT: [[R:%[a-z0-9_]+]] = "torch.call_function"([[Q]]) {target = "torch.nn.functional.relu"{{.*}} -> tensor<2x4x8x8xbf16>
// CHECK-NEXT: [[P:%[a-z0-9_]+]] = "torch.call_function"([[R]]) {target = "torch.nn.functional.max_pool2d"{{.*}} -> tensor<2x4x4x4xbf16>
// CHECK-NEXT: [[S:%[a-z0-9_]+]] = "lp.stand_in"([[P]]) {dtype = "float32"} : (tensor<2x4x4x4xbf16>) -> tensor<2x4x4x4xf32>
// CHECK:      [[Y:%[a-z0-9_]+]] = "lp.gemm"([[S]], %wb, [[P]],
// CHECK-NEXT: "torch.return"([[Y]])
""",
    )
    casts, moved = _bytes(run(text, _CAST))
    after, fewer = _bytes(run(text, _DROP))
    assert (casts, after) == (4, 4)
    assert fewer < moved


def test_the_scale_of_a_relu_is_computed_before_it() -> None:
    spec = layer(_TENSOR)
    check(
        run(convolutions(spec), f"{_CAST},place-regions{{carriers=drop,finite=true}}"),
        """
// CHECK:      [[G:%[a-z0-9_]+]] = "lp.gemm"(%x, %wa
// CHECK-NEXT: [[A:%[a-z0-9_]+]] = "torch.call_function"([[G]]) {target = "torch.amax"}
// CHECK-NEXT: [[L:%[a-z0-9_]+]] = "torch.call_function"([[A]]) {target = "torch.nn.functional.relu"
// CHECK-NEXT: [[S:%[a-z0-9_]+]] = "lp.scale"([[L]])
// CHECK-NEXT: [[Q:%[a-z0-9_]+]] = "lp.quantize"([[G]], [[S]]) {{.*}} -> !lp.quant<"int8", "tensor", none, tensor<2x4x8x8xi8>>
// CHECK-NEXT: [[R:%[a-z0-9_]+]] = "torch.call_function"([[Q]]) {target = "torch.nn.functional.relu"
// CHECK-NEXT: [[P:%[a-z0-9_]+]] = "torch.call_function"([[R]]) {target = "torch.nn.functional.max_pool2d"
// CHECK-NEXT: [[X:%[a-z0-9_]+]] = "lp.stand_in"([[P]])
// CHECK:      "lp.gemm"([[X]], %wb, [[P]], [[S]],
""",
    )


@pytest.mark.parametrize("spec", [layer(E4M3), SCALED], ids=["no scale", "row and column scales"])
@pytest.mark.parametrize("passes", [_KEEP, _DROP], ids=["keep", "drop"])
def test_q_k_and_v_cast_what_they_reshape_once(spec: str, passes: str) -> None:
    text = reshaped_layers(spec)
    before, after = run(text, _CAST), run(text, passes)
    num_grad = 1 if spec == SCALED else 0
    kept = num_grad if passes is _KEEP else 0
    assert _bytes(before)[0] == 6 + 3 * num_grad
    assert _bytes(after)[0] == 4 + kept
    assert _bytes(after)[1] < _bytes(before)[1]
    check(
        after,
        """
// CHECK:     "lp.quantize"(%x
// CHECK-NOT: "lp.quantize"(%x_
""",
    )


def test_nothing_moves_while_the_gradient_needs_the_value() -> None:
    check(
        run(convolutions(), _KEEP),
        """
// CHECK:     %relu = "torch.call_function"(%gemm)
// CHECK:     %pool = "torch.call_function"(%relu)
// CHECK:     "lp.quantize"(%pool)
// CHECK-NOT: lp.stand_in
""",
    )


_WRITE = (
    '%w = "torch.call_function"(%pool) {target = "torch.Tensor.add_", args = "_, 1"}'
    " : (tensor<2x4x4x4xf32>) -> tensor<2x4x4x4xf32>"
)
_STAYS = {
    "an in-place op behind the value": convolutions(between=_WRITE),
    "a stochastic cast": convolutions(layer("e4m3 stochastic")),
    "a relu in place": convolutions().replace("inplace=False", "inplace=True"),
    "int8, where a window may hold a NaN": convolutions(layer(_TENSOR)),
    "a scale of more than the windows hold": convolutions(layer(_TENSOR)).replace(
        "_, 3, stride=2, padding=1", "_, 1, stride=2"
    ),
    "a format without 0": convolutions(layer("int1 nearest_even")),
    "another reader of the value": convolutions(ends="%y, %pool"),
}


@pytest.mark.parametrize("why", _STAYS)
def test_a_cast_stays_where_it_is(why: str) -> None:
    passes = _DROP.replace("drop", "drop,finite=true") if why.startswith("a scale") else _DROP
    check(
        run(_STAYS[why], passes),
        """
// CHECK:     %pool = "torch.call_function"(%relu)
// CHECK:     "lp.quantize"(%pool
// CHECK-NOT: lp.stand_in
""",
    )


def test_a_result_that_shows_the_sign_of_a_zero_is_cast_behind_the_relu() -> None:
    """relu(-1e-9) is +0, and the cast of -1e-9 is -0, which relu leaves: a sum does not see it, a result does."""
    cast = '%c = "lp.quantize"(%pool) {spec = "e4m3 nearest_even", site = 0, slot = 0, operands = ["x"]} : (tensor<2x4x4x4xf32>) -> !lp.quant<"e4m3", "none", none, tensor<2x4x4x4xbf16>>'
    text = convolutions(between=cast, ends="%y, %c").replace(
        "(tensor<2x4x4x4xf32>, tensor<2x4x4x4xf32>) -> ()",
        '(tensor<2x4x4x4xf32>, !lp.quant<"e4m3", "none", none, tensor<2x4x4x4xbf16>>) -> ()',
    )
    check(run(text, _DROP), '// CHECK: "lp.quantize"(%pool)')
    assert "lp.stand_in" not in run(text, _DROP)


def test_inference_leaves_out_what_only_backward_reads() -> None:
    spec = f"fwd: {E4M3} * {E4M3} -> fp32 -> fp32; bwd: {E4M3} * {E4M3} -> fp32 -> fp32; grad: {E4M3} * e5m2 nearest_even -> fp32 -> fp32"
    text = two_layers(spec)
    assert _bytes(run(text, _CAST))[0] == 4
    check(
        run(text, _DROP),
        """
// CHECK:      [[Q:%[a-z0-9_]+]] = "lp.quantize"(%x) {spec = "e4m3 nearest_even"
// CHECK:      "lp.gemm"(%x, %wa, [[Q]], %{{[a-z0-9_]+}}, %_lp_state)
// CHECK-NOT:  "lp.quantize"(%x)
// CHECK:      "lp.gemm"(%x, %wb, [[Q]], %{{[a-z0-9_]+}}, %_lp_state)
""",
    )
    assert run(text, f"{_DROP},place-regions{{carriers=drop}}").count("lp.quantize") == run(text, _DROP).count(
        "lp.quantize"
    )


def test_a_graph_that_switches_grad_mode_keeps_its_carriers() -> None:
    switch = '%s = "torch.call_function"() {target = "torch._C._set_grad_enabled", args = "True"} : () -> !torch.value'
    text = convolutions(between=switch)
    assert "lp.stand_in" not in run(text, _DROP)


def test_options_print_and_parse_and_what_is_no_way_is_refused() -> None:
    (found,) = parse_passes("place-regions{carriers=drop,finite=true}", PASSES)
    assert str(found) == "place-regions{carriers=drop,finite=true}"
    with pytest.raises(PassError, match=r"place-regions\{carriers\}: no such way. Expected keep or drop"):
        parse_passes("place-regions{carriers=lose}", PASSES)
    with pytest.raises(PassError, match="insert-casts before it"):
        run(convolutions(), "annotate,place-regions")


def test_a_second_run_changes_nothing() -> None:
    once = run(convolutions(), _DROP)
    assert run(once, "place-regions{carriers=drop}").partition("lp.site")[2] == once.partition("lp.site")[2]


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_blocks_stay_where_they_are(format: str) -> None:
    text = reshaped_layers(layer(f"{format} nearest_even"))
    for passes in (_KEEP, _DROP):
        check(run(text, passes), '// CHECK-NOT: "lp.quantize"(%x)')
    assert run(text, _KEEP).count('"lp.quantize"') == run(text, _CAST).count('"lp.quantize"') > 0


@pytest.mark.parametrize("passes", [_KEEP, _DROP], ids=["keep", "drop"])
def test_views_around_a_write_are_not_cast_as_one(passes: str) -> None:
    """x_k is a view from before the write, and k reads it after."""
    write = '%w = "torch.call_function"(%x) {target = "torch.Tensor.add_", args = "_, 1"} : (tensor<2x6x4xf32>) -> tensor<2x6x4xf32>'
    text = reshaped_layers().replace('%k = "torch.call_function"', f'{write}\n    %k = "torch.call_function"')
    assert text.count("add_") == 1
    assert _bytes(run(text, passes))[0] == _bytes(run(text, _CAST))[0] == 6
    check(run(text, passes), '// CHECK-NOT: "lp.quantize"(%x)')
