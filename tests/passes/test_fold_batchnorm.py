"""fold-batchnorm on programs as text: what becomes of a batch norm on either side, and why one stays."""

import pytest

from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES
from runtime.errors import LpError
from tests.passes.golden import check, run
from tests.passes.ir.xdsl_dialect import verify_text
from tests.passes.programs_for_tests import E4M3, layer

_CONV = "tensor<2x3x8x8xf32>"
_OUT = "tensor<2x4x6x6xf32>"


def norm(name: str, x: str, features: int, shape: str, *, training: bool = False) -> str:
    """A batch norm of the module `name`, of `x`."""
    kind = f"tensor<{features}xf32>"
    reads = "".join(
        f"""
    %{name}_{short} = "torch.get_attr"() {{target = "{name}.{target}"}} : () -> {kind}"""
        for short, target in (("w", "weight"), ("b", "bias"), ("m", "running_mean"), ("v", "running_var"))
    )
    operands = ", ".join(f"%{name}_{short}" for short in "wbmv")
    return f"""{reads}
    %{name} = "torch.call_function"({x}, {operands}) {{target = "torch.batch_norm",
      args = "_, _, _, _, _, {training}, 0.1, 1e-05, False"}} : ({shape}, {", ".join([kind] * 4)}) -> {shape}"""


def conv(name: str, x: str, padding: str = "(0, 0)", out: str = _OUT, site: str = "conv") -> str:
    """A convolution of 3 channels into 4, window 3 x 3."""
    return f"""
    %{name}_w = "torch.get_attr"() {{target = "{site}.weight"}} : () -> tensor<4x3x3x3xf32>
    %{name} = "torch.call_function"({x}, %{name}_w) {{target = "torch.nn.functional.conv2d",
      args = "_, _, None, (1, 1), {padding}, (1, 1), 1", lp.site = "{site}"}}
      : ({_CONV}, tensor<4x3x3x3xf32>) -> {out}"""


def block(*body: str, back: str = "%bn", out: str = _OUT, spec: str = layer(E4M3)) -> str:
    """A graph of x (2, 3, 8, 8)."""
    return f"""
"builtin.module"() ({{
  "lp.site"() {{name = "conv", spec = "{spec}"}} : () -> ()
  "torch.graph"() <{{sym_name = "#0", path = "", kind = "module"}}> ({{
  ^bb0(%x : {_CONV}):{"".join(body)}
    "torch.return"({back}) : ({", ".join(out for _ in back.split(","))}) -> ()
  }}) : () -> ()
}}) : () -> ()
"""


AFTER = block(conv("c", "%x"), norm("bn", "%c", 4, _OUT))
BEFORE = block(norm("bn", "%x", 3, _CONV), conv("c", "%bn"), back="%c")


def test_a_batch_norm_after_a_convolution_goes_into_it() -> None:
    text = run(AFTER, "annotate,fold-batchnorm")
    check(
        text,
        """
// CHECK:      [[S:%[a-z0-9_]+]] = "lp.norm_scale"(%bn_w, %bn_v) {eps = 1.0e-05
// CHECK-NEXT: [[T:%[a-z0-9_]+]] = "lp.norm_shift"(%bn_b, %bn_m, [[S]])
// CHECK-NEXT: [[B:%[a-z0-9_]+]] = "lp.fold_bias"(%c_w, [[S]], [[T]]) {operands = ["w", "s", "t"]}
// CHECK-NEXT: [[W:%[a-z0-9_]+]] = "lp.fold_weight"(%c_w, [[S]]) {axis = 0, groups = 1, lp.weight = true}
// CHECK-SAME: -> tensor<4x3x3x3xf32>
// CHECK-NEXT: %c = "torch.call_function"(%x, [[W]], [[B]]) {target = "torch.conv2d"
// CHECK-NEXT: "torch.return"(%c)
""",
    )
    assert print_program(parse_program(text)) == text
    verify_text(text)


def test_a_batch_norm_before_a_convolution_goes_into_it() -> None:
    text = run(BEFORE, "annotate,fold-batchnorm,insert-casts,share-casts,select-kernels")
    check(
        text,
        """
// CHECK:      [[B:%[a-z0-9_]+]] = "lp.fold_input_bias"(%c_w, {{.*}}) {axis = 1, groups = 1
// CHECK-NEXT: [[W:%[a-z0-9_]+]] = "lp.fold_weight"(%c_w, {{.*}}) {axis = 1, groups = 1
// CHECK:      "lp.quantize"(%x
// CHECK:      "lp.quantize"([[W]])
// CHECK:      "lp.gemm"(%x, [[W]], [[B]],
// CHECK-NEXT: "torch.return"
""",
    )
    assert print_program(parse_program(text)) == text
    verify_text(text)


def test_batch_norms_on_both_sides_go_into_one_weight() -> None:
    text = block(norm("bn0", "%x", 3, _CONV), conv("c", "%bn0"), norm("bn", "%c", 4, _OUT))
    check(
        run(text, "annotate,fold-batchnorm,insert-casts,share-casts"),
        """
// CHECK:      [[B:%[a-z0-9_]+]] = "lp.fold_input_bias"(%c_w
// CHECK-NEXT: [[W:%[a-z0-9_]+]] = "lp.fold_weight"(%c_w
// CHECK:      "lp.fold_bias"([[W]], [[B]], {{.*}}
// CHECK-NEXT: "lp.fold_weight"([[W]], {{.*}}) {axis = 0
// CHECK-NOT:  batch_norm
""",
    )


def test_each_call_of_a_shared_layer_has_its_own_batch_norm() -> None:
    text = block(
        conv("c", "%x"), norm("bn", "%c", 4, _OUT), conv("d", "%x"), norm("bn2", "%d", 4, _OUT), back="%bn, %bn2"
    )
    check(
        run(text, "annotate,fold-batchnorm,insert-casts,share-casts,select-kernels"),
        """
// CHECK:      "lp.norm_scale"(%bn_w
// CHECK:      "lp.quantize"(%x)
// CHECK:      "lp.gemm"
// CHECK:      "lp.norm_scale"(%bn2_w
// CHECK-NOT:  "lp.quantize"(%x)
// CHECK:      "lp.gemm"
""",
    )


_WRITE = f"""
    %r = "torch.call_function"(%x) {{target = "torch.Tensor.add_", args = "_, 1"}} : ({_CONV}) -> {_CONV}"""
_PADDED = "tensor<2x4x8x8xf32>"

REASONS = {
    "another consumer": (
        block(conv("c", "%x"), norm("bn", "%c", 4, _OUT), back="%bn, %c"),
        "it is not all that uses what conv gives",
    ),
    "no statistics": (
        block(conv("c", "%x"), norm("bn", "%c", 4, _OUT, training=True)),
        "it has no running statistics",
    ),
    "padding": (
        block(norm("bn", "%x", 3, _CONV), conv("c", "%bn", "(1, 1)", _PADDED), back="%c", out=_PADDED),
        "conv pads or spreads what it gives",
    ),
    "a write between": (
        block(norm("bn", "%x", 3, _CONV), _WRITE, conv("c", "%bn"), back="%c"),
        "operations between it and the layer",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_batch_norm_that_stays_has_a_reason(name: str) -> None:
    text, reason = REASONS[name]
    program = parse_program(text)
    before = [str(unit.graph) for unit in program.units.values()]
    run_passes(program, parse_passes("annotate,fold-batchnorm", PASSES))
    assert [str(unit.graph) for unit in program.units.values()] == before
    (finding,) = program.findings
    assert reason in str(finding)
    assert (finding.where, finding.code) == ("bn", "batch-norm-kept")


def test_under_a_policy_that_names_nothing_nothing_is_done() -> None:
    program = parse_program(AFTER.replace('"lp.site"() {name = "conv"', '"lp.site"() {name = "x"'))
    records = run_passes(program, parse_passes("annotate,fold-batchnorm", PASSES))
    assert [record.changed for record in records] == [False, False]
    assert not program.findings


MUTATIONS = {
    "axis": ("axis = 0, groups = 1", "axis = 2, groups = 1", "`axis` must be 0 or 1"),
    "groups": ("axis = 0, groups = 1", "axis = 0, groups = 0", "`groups` must be at least 1"),
    "eps": ("eps = 1.0e-05", "eps = -1.0", "`eps` must not be negative"),
    "kind of eps": ("eps = 1.0e-05", "eps = 1", "attribute eps has another type. Expected a number"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_breaks_a_rule_is_rejected_twice(name: str) -> None:
    right, wrong, sentence = MUTATIONS[name]
    text = run(AFTER, "annotate,fold-batchnorm")
    broken = text.replace(right, wrong, 1)
    assert broken != text
    with pytest.raises(LpError, match=sentence):
        parse_program(broken)
    with pytest.raises(LpError):
        verify_text(broken)


def test_a_scale_of_other_features_than_the_weight_is_rejected() -> None:
    text = """
"builtin.module"() ({
  "torch.graph"() <{sym_name = "m#0", path = "m", kind = "module"}> ({
  ^bb0(%w : tensor<4x3xf32>, %s : tensor<3xf32>):
    %y = "lp.fold_weight"(%w, %s) {axis = 0, groups = 1} : (tensor<4x3xf32>, tensor<3xf32>) -> tensor<4x3xf32>
    "torch.return"(%y) : (tensor<4x3xf32>) -> ()
  }) : () -> ()
}) : () -> ()
"""
    with pytest.raises(LpError, match="one number per feature along `axis` of w"):
        parse_program(text)
    assert parse_program(text.replace("axis = 0", "axis = 1"))


@pytest.mark.parametrize("text", [AFTER, BEFORE], ids=["after", "before"])
def test_the_cast_of_a_folded_weight_is_kept(text: str) -> None:
    check(
        run(text, "annotate,fold-batchnorm,insert-casts,fold-constants{lifetime=forever}"),
        """
// CHECK: [[W:%[a-z0-9_]+]] = "lp.fold_weight"(
// CHECK: "lp.quantize"(%x) {{.*}}slot = 0, operand
// CHECK: "lp.quantize"([[W]], %_lp_state) {{.*}}slot = 1, lifetime = "forever"
""",
    )
