# ruff: noqa: E501
"""fold-constants as text: which casts are kept, which are not, and that the result prints, parses and verifies."""

import pytest

from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.manager import parse_passes
from passes.pipelines import PASSES, PIPELINES
from runtime.errors import ParseError, PassError, VerifyError
from tests.passes.golden import check, run
from tests.passes.ir.xdsl_dialect import verify_text
from tests.passes.programs_for_tests import E4M3, layer, linear, two_layers

RANDOM = "e4m3 stochastic"


def test_casts_of_a_weight_are_kept_and_those_of_an_input_are_not() -> None:
    check(
        run(linear(), "annotate,insert-casts,fold-constants"),
        """
// CHECK:      [[SX:%[a-z0-9_]+]] = "lp.scale"(%x) {spec = "e4m3 nearest_even row/amax"} :
// CHECK-NEXT: [[QX:%[a-z0-9_]+]] = "lp.quantize"(%x, [[SX]]) {spec = "e4m3 nearest_even row/amax", site = 0, slot = 0, operands
// CHECK-NEXT: [[SW:%[a-z0-9_]+]] = "lp.constant_scale"(%w, %_lp_state) {spec = "e4m3 nearest_even row/amax", site = 0, slot = 1, lifetime = "step"} : (tensor<16x4xf32>, !lp.state) -> tensor<16x1xf32>
// CHECK-NEXT: [[QW:%[a-z0-9_]+]] = "lp.quantize"(%w, [[SW]], %_lp_state) {spec = "e4m3 nearest_even row/amax", site = 0, slot = 1, lifetime = "step"
// CHECK-SAME: -> !lp.quant<"e4m3", "row", 1, tensor<16x4xbf16>>
// CHECK:      "lp.gemm"(%x, %w, %b, [[QX]], [[SX]], [[QW]], [[SW]],
// CHECK-SAME: lifetime = "step"
// CHECK-NOT:  "lp.scale"(%w
""",
    )


def test_the_lifetime_is_an_option() -> None:
    check(
        run(linear(layer(E4M3)), "annotate,insert-casts,fold-constants{lifetime=forever}"),
        """
// CHECK: passes = "annotate,insert-casts,fold-constants{lifetime=forever}"
// CHECK: "lp.quantize"(%w, %_lp_state) {{.*}}lifetime = "forever"
// CHECK: "lp.gemm"({{.*}}lifetime = "forever"
""",
    )
    with pytest.raises(PassError, match="Expected step or forever"):
        parse_passes("fold-constants{lifetime=day}", PASSES)


@pytest.mark.parametrize("spec", [layer(RANDOM), layer("fp32 nearest_even")], ids=["stochastic", "identity"])
def test_what_is_drawn_anew_or_is_no_cast_is_left_alone(spec: str) -> None:
    check(run(linear(spec), "annotate,insert-casts,fold-constants"), "// CHECK-NOT: lifetime = ")


def test_each_role_is_judged_by_its_own_cast() -> None:
    check(
        run(linear(layer(RANDOM, bwd=E4M3)), "annotate,insert-casts,fold-constants"),
        """
// CHECK-NOT: "lp.quantize"({{.*}}lifetime =
// CHECK: "lp.gemm"({{.*}}lifetime = "step"
""",
    )


def test_a_stochastic_cast_in_backward_is_not_kept() -> None:
    check(
        run(linear(layer(E4M3, bwd=RANDOM)), "annotate,insert-casts,fold-constants"),
        """
// CHECK: "lp.quantize"(%w, %_lp_state) {{.*}}lifetime = "step"
// CHECK: "lp.gemm"
// CHECK-NOT: lifetime =
""",
    )


def test_of_two_products_with_one_input_the_casts_of_the_weights_are_kept() -> None:
    check(
        run(two_layers(), "annotate,insert-casts,share-casts,fold-constants"),
        """
// CHECK:      "lp.quantize"(%x) {{.*}}slot = 0, operand
// CHECK:      "lp.quantize"(%wa, %_lp_state) {{.*}}lifetime = "step"
// CHECK-NOT:  "lp.quantize"(%x)
// CHECK:      "lp.quantize"(%wb, %_lp_state) {{.*}}lifetime = "step"
""",
    )


def _derived(operation: str, spec: str = layer(E4M3)) -> str:
    """y = x . f(w, g) as a module's graph; `operation` computes %v of %w and %g, and %x in what is no constant."""
    kinds = ", ".join("tensor<4x4xf32>" for _ in operation.partition("{")[0].split(","))
    return f"""
"builtin.module"() ({{
  "lp.site"() {{name = "m.matmul_0", spec = "{spec}"}} : () -> ()
  "torch.graph"() <{{sym_name = "m#0", path = "m", kind = "module"}}> ({{
  ^bb0(%x : tensor<4x4xf32>):
    %w = "torch.get_attr"() {{target = "weight"}} : () -> tensor<4x4xf32>
    %g = "torch.get_attr"() {{target = "gain"}} : () -> tensor<4x4xf32>
    %v = {operation} : ({kinds}) -> tensor<4x4xf32>
    %y = "torch.call_function"(%x, %v) {{target = "torch.matmul", lp.site = "m.matmul_0"}}
      : (tensor<4x4xf32>, tensor<4x4xf32>) -> tensor<4x4xf32>
    "torch.return"(%y) : (tensor<4x4xf32>) -> ()
  }}) : () -> ()
}}) : () -> ()
"""


FOLDED = '"torch.call_function"(%w, %g) {target = "torch.mul"}'
VIEW = '"torch.call_function"(%w, %g) {target = "torch.Tensor.view_as"}'
OF_INPUT = '"torch.call_function"(%w, %x) {target = "torch.mul"}'
DRAWN = '"torch.call_function"(%w) {target = "torch.nn.functional.dropout"}'


@pytest.mark.parametrize("operation", [FOLDED, VIEW], ids=["folded", "view"])
def test_what_follows_from_weights_alone_is_a_constant(operation: str) -> None:
    check(
        run(_derived(operation), "annotate,insert-casts,fold-constants"),
        """
// CHECK: "lp.quantize"(%x) {{.*}}slot = 0, operand
// CHECK: "lp.quantize"(%v, %_lp_state) {{.*}}lifetime = "step"
""",
    )


def test_a_constant_that_is_read_in_backward_is_cast_in_forward_and_kept_there() -> None:
    """A product of operations saves its cast for BWD: nothing is left to ask for in backward."""
    check(
        run(_derived(FOLDED, layer(E4M3, bwd="e5m2 nearest_even")), "annotate,insert-casts,fold-constants"),
        """
// CHECK: "lp.quantize"(%v, %_lp_state) {spec = "e4m3 nearest_even"{{.*}}lifetime = "step"
// CHECK: "lp.quantize"(%v, %_lp_state) {spec = "e5m2 nearest_even"{{.*}}lifetime = "step"
// CHECK: "lp.gemm"
// CHECK-NOT: lifetime =
""",
    )


@pytest.mark.parametrize("operation", [OF_INPUT, DRAWN], ids=["input", "dropout"])
def test_what_follows_from_the_input_or_from_chance_is_not(operation: str) -> None:
    check(run(_derived(operation), "annotate,insert-casts,fold-constants"), "// CHECK-NOT: lifetime =")


def test_a_write_between_scale_and_cast_keeps_both_as_they_were() -> None:
    text = run(_derived(FOLDED, layer("e4m3 nearest_even tensor/amax")), "annotate,insert-casts")
    lines = text.splitlines()
    at = next(n for n, line in enumerate(lines) if '"lp.quantize"(%v' in line)
    write = '%written = "torch.call_function"(%v) {target = "torch.Tensor.add_", args = "_, 1"}'
    lines.insert(at, f"    {write} : (tensor<4x4xf32>) -> tensor<4x4xf32>")
    check(run("\n".join(lines), "fold-constants"), "// CHECK-NOT: lifetime =")


def test_it_comes_after_insert_casts_and_changes_nothing_twice() -> None:
    with pytest.raises(PassError, match="Try insert-casts before it"):
        run(linear(), "annotate,fold-constants")
    once = run(linear(), "annotate,insert-casts,fold-constants")
    assert run(once, "fold-constants").replace(",fold-constants{lifetime=step}", "", 1) == once


@pytest.mark.parametrize("mode", PIPELINES)
def test_the_text_parses_back_and_xdsl_takes_it(mode: str) -> None:
    lifetime = {"train": "step", "infer": "forever"}[mode]
    text = run(linear(), PIPELINES[mode])
    assert text.count(f'lifetime = "{lifetime}"') == 3
    assert print_program(parse_program(text)) == text
    verify_text(text)


BROKEN = {
    "another lifetime": ('lifetime = "step"', 'lifetime = "day"', "`lifetime` must be step or forever"),
    "stochastic": ("e4m3 nearest_even", "e4m3 stochastic", "a cast that rounds stochastically is not kept"),
    "no state": ('"lp.quantize"(%w, %_lp_state)', '"lp.quantize"(%w)', "must have the `state` that keeps it"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_a_rule_is_refused_twice(name: str) -> None:
    text = run(linear(layer(E4M3)), "annotate,insert-casts,fold-constants")
    old, new, sentence = BROKEN[name]
    line = next(line for line in text.splitlines() if '"lp.quantize"(%w' in line)
    broken = line.replace(old, new)
    if name == "no state":
        broken = broken.replace('["x", "state"]', '["x"]').replace(", !lp.state)", ")")
    assert broken != line
    broken = text.replace(line, broken)
    with pytest.raises(ParseError, match=sentence):
        parse_program(broken)
    with pytest.raises(VerifyError, match=sentence):
        verify_text(broken)
