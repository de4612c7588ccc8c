"""fold-batchnorm on programs as text: what becomes of a batch norm on either side, and why one stays."""

import pytest

from passes.ir.dialect import verify_text
from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES
from runtime.errors import LpError
from tests.passes.golden import check, run
from tests.passes.programs_for_tests import E4M3, layer

_CONV = "tensor<2x3x8x8xf32>"
_OUT = "tensor<2x4x6x6xf32>"


def norm(name: str, features: int, *, training: bool = False, flags: str = "") -> str:
    """A batch norm in evaluation mode, as the graph of a leaf."""
    kind = f"tensor<{features}xf32>"
    reads = "\n".join(
        f'    %{short} = "torch.get_attr"() {{target = "{target}"}} : () -> {kind}'
        for short, target in (("m", "running_mean"), ("v", "running_var"), ("w", "weight"), ("b", "bias"))
    )
    return f"""
  "torch.graph"() <{{sym_name = "block.{name}", path = "block.{name}", kind = "leaf"{flags}}}> ({{
  ^bb0(%x : !torch.value):
{reads}
    %y = "torch.call_function"(%x, %m, %v, %w, %b) {{target = "torch.nn.functional.batch_norm",
      args = "_, _, _, _, _, {training}, 0.1, 1e-05"}} : (!torch.value, {kind}, {kind}, {kind}, {kind}) -> !torch.value
    "torch.return"(%y) : (!torch.value) -> ()
  }}) : () -> ()"""


def conv(padding: str = "(0, 0)", flags: str = "") -> str:
    """A convolution of 3 channels into 4, window 3 x 3, as the graph of a leaf."""
    return f"""
  "torch.graph"() <{{sym_name = "block.conv", path = "block.conv", kind = "leaf"{flags}}}> ({{
  ^bb0(%x : {_CONV}):
    %w = "torch.get_attr"() {{target = "weight"}} : () -> tensor<4x3x3x3xf32>
    %y = "torch.call_function"(%x, %w) {{target = "torch.nn.functional.conv2d",
      args = "_, _, None, (1, 1), {padding}, (1, 1), 1", lp.site = "block.conv"}}
      : ({_CONV}, tensor<4x3x3x3xf32>) -> tensor<2x4x6x6xf32>
    "torch.return"(%y) : (tensor<2x4x6x6xf32>) -> ()
  }}) : () -> ()"""


def block(leaves: str, body: str, spec: str = layer(E4M3)) -> str:
    """A module called `block`, x (2, 3, 8, 8), that calls `leaves`."""
    return f"""
"builtin.module"() ({{
  "lp.site"() {{name = "block.conv", spec = "{spec}"}} : () -> (){leaves}
  "torch.graph"() <{{sym_name = "block#0", path = "block", kind = "module"}}> ({{
  ^bb0(%x : {_CONV}):
{body}
  }}) : () -> ()
}}) : () -> ()
"""


AFTER = f"""
    %c = "torch.call_module"(%x) {{target = "conv"}} : ({_CONV}) -> {_OUT}
    %y = "torch.call_module"(%c) {{target = "bn"}} : ({_OUT}) -> {_OUT}
    "torch.return"(%y) : ({_OUT}) -> ()"""

BEFORE = f"""
    %z = "torch.call_module"(%x) {{target = "bn"}} : ({_CONV}) -> {_CONV}
    %y = "torch.call_module"(%z) {{target = "conv"}} : ({_CONV}) -> {_OUT}
    "torch.return"(%y) : ({_OUT}) -> ()"""


def test_a_batch_norm_after_a_convolution_is_handed_to_it() -> None:
    text = run(block(conv() + norm("bn", 4), AFTER), "annotate,fold-batchnorm")
    check(
        text,
        """
// CHECK-LABEL: sym_name = "block.conv/fed", path = "block.conv", kind = "fed"
// CHECK:      ^bb0(%x : tensor<2x3x8x8xf32>, %lp_affine : !torch.value):
// CHECK:      [[S:%[a-z0-9_]+]] = "torch.call_function"(%lp_affine) {target = "operator.getitem", args = "_, 0"}
// CHECK:      [[T:%[a-z0-9_]+]] = "torch.call_function"(%lp_affine) {target = "operator.getitem", args = "_, 1"}
// CHECK:      [[B:%[a-z0-9_]+]] = "lp.fold_bias"(%w, [[S]], [[T]]) {operands = ["w", "s", "t"]}
// CHECK-NEXT: [[W:%[a-z0-9_]+]] = "lp.fold_weight"(%w, [[S]]) {axis = 0, groups = 1, lp.weight = true}
// CHECK-SAME: -> tensor<4x3x3x3xf32>
// CHECK-NEXT: "torch.call_function"(%x, [[W]], [[B]]) {target = "torch.conv2d"
// CHECK-LABEL: sym_name = "block#0"
// CHECK:      [[M:%[a-z0-9_]+]] = "torch.get_attr"() {target = "bn.running_mean"} : () -> tensor<4xf32>
// CHECK-NEXT: [[V:%[a-z0-9_]+]] = "torch.get_attr"() {target = "bn.running_var"}
// CHECK-NEXT: [[G:%[a-z0-9_]+]] = "torch.get_attr"() {target = "bn.weight"}
// CHECK-NEXT: [[D:%[a-z0-9_]+]] = "torch.get_attr"() {target = "bn.bias"}
// CHECK-NEXT: [[S:%[a-z0-9_]+]] = "lp.norm_scale"([[G]], [[V]]) {eps = 1.0e-05
// CHECK-NEXT: [[T:%[a-z0-9_]+]] = "lp.norm_shift"([[D]], [[M]], [[S]])
// CHECK-NEXT: %c = "torch.call_module"(%x, [[S]], [[T]]) {target = "conv", args = "_, lp_affine=(_, _)",
// CHECK-SAME: lp.folded = "bn"}
// CHECK-NEXT: "torch.return"(%c)
""",
    )
    assert print_program(parse_program(text)) == text
    verify_text(text)


def test_a_batch_norm_before_a_convolution_is_handed_to_it() -> None:
    text = run(block(conv() + norm("bn", 3), BEFORE), "annotate,fold-batchnorm,insert-casts,share-casts,select-kernels")
    check(
        text,
        """
// CHECK-LABEL: sym_name = "block.conv/fed"
// CHECK:      ^bb0(%x : tensor<2x3x8x8xf32>, %lp_input_affine : !torch.value):
// CHECK:      [[B:%[a-z0-9_]+]] = "lp.fold_input_bias"(%w, {{.*}}) {axis = 1, groups = 1
// CHECK-NEXT: [[W:%[a-z0-9_]+]] = "lp.fold_weight"(%w, {{.*}}) {axis = 1, groups = 1
// CHECK:      "lp.quantize"([[W]])
// CHECK:      "lp.gemm"(%x, [[W]], [[B]],
// CHECK-LABEL: sym_name = "block#0"
// CHECK:      "torch.call_module"(%x, {{.*}}) {target = "conv", args = "_, lp_input_affine=(_, _)", lp.folded = "bn"}
// CHECK-NEXT: "torch.return"
""",
    )
    assert print_program(parse_program(text)) == text
    verify_text(text)


def test_batch_norms_on_both_sides_are_handed_together() -> None:
    body = f"""
    %z = "torch.call_module"(%x) {{target = "bn0"}} : ({_CONV}) -> {_CONV}
    %c = "torch.call_module"(%z) {{target = "conv"}} : ({_CONV}) -> {_OUT}
    %y = "torch.call_module"(%c) {{target = "bn1"}} : ({_OUT}) -> {_OUT}
    "torch.return"(%y) : ({_OUT}) -> ()"""
    check(
        run(block(conv() + norm("bn0", 3) + norm("bn1", 4), body), "annotate,fold-batchnorm,insert-casts,share-casts"),
        """
// CHECK-LABEL: sym_name = "block.conv/fed"
// CHECK:      ^bb0(%x : {{.*}}, %lp_input_affine : !torch.value, %lp_affine : !torch.value):
// CHECK:      [[B:%[a-z0-9_]+]] = "lp.fold_input_bias"(%w
// CHECK-NEXT: [[W:%[a-z0-9_]+]] = "lp.fold_weight"(%w
// CHECK:      "lp.fold_bias"([[W]], [[B]], {{.*}}
// CHECK-NEXT: "lp.fold_weight"([[W]], {{.*}}) {axis = 0
// CHECK-LABEL: sym_name = "block#0"
// CHECK:      args = "_, lp_input_affine=(_, _), lp_affine=(_, _)", lp.folded = "bn0,bn1"}
""",
    )


_USED_TWICE = f"""
    %c = "torch.call_module"(%x) {{target = "conv"}} : ({_CONV}) -> {_OUT}
    %y = "torch.call_module"(%c) {{target = "bn"}} : ({_OUT}) -> {_OUT}
    "torch.return"(%y, %c) : ({_OUT}, {_OUT}) -> ()"""

_APART = f"""
    %z = "torch.call_module"(%x) {{target = "bn"}} : ({_CONV}) -> {_CONV}
    %r = "torch.call_function"(%x) {{target = "torch.Tensor.add_", args = "_, 1"}} : ({_CONV}) -> {_CONV}
    %y = "torch.call_module"(%z) {{target = "conv"}} : ({_CONV}) -> {_OUT}
    "torch.return"(%y, %r) : ({_OUT}, {_CONV}) -> ()"""

_UNBATCHED = f"""
    %c = "torch.call_module"(%x) {{target = "conv"}} : ({_CONV}) -> tensor<4x6x6xf32>
    %y = "torch.call_module"(%c) {{target = "bn"}} : (tensor<4x6x6xf32>) -> {_OUT}
    "torch.return"(%y) : ({_OUT}) -> ()"""

_TWO_SIDES = f"""
    %c = "torch.call_module"(%x) {{target = "conv"}} : ({_CONV}) -> {_OUT}
    %y = "torch.call_module"(%c) {{target = "bn"}} : ({_OUT}) -> {_OUT}
    %z = "torch.call_module"(%x) {{target = "other"}} : ({_CONV}) -> {_CONV}
    %d = "torch.call_module"(%z) {{target = "conv"}} : ({_CONV}) -> {_OUT}
    "torch.return"(%y, %d) : ({_OUT}, {_OUT}) -> ()"""

_OBSERVED = ", is_observed = true"

REASONS = {
    "another consumer": (conv() + norm("bn", 4), _USED_TWICE, "it is not all that uses what block.conv gives"),
    "no statistics": (conv() + norm("bn", 4, training=True), AFTER, "it has no running statistics"),
    "hooks on it": (conv() + norm("bn", 4, flags=_OBSERVED), AFTER, "hooks see what block.bn is given or gives"),
    "hooks on the layer": (conv(flags=_OBSERVED) + norm("bn", 4), AFTER, "hooks see what block.conv is given"),
    "padding": (conv("(1, 1)") + norm("bn", 3), BEFORE, "block.conv pads or spreads what it gives"),
    "a write between": (conv() + norm("bn", 3), _APART, "other operations run between it and the layer"),
    "no batch": (conv() + norm("bn", 4), _UNBATCHED, "a tensor of 4 dims is expected"),
    "two sides": (conv() + norm("bn", 4) + norm("other", 3), _TWO_SIDES, "have batch norms on different sides"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_batch_norm_that_stays_has_a_reason(name: str) -> None:
    leaves, body, reason = REASONS[name]
    program = parse_program(block(leaves, body))
    before = [str(unit.graph) for unit in program.units.values()]
    run_passes(program, parse_passes("annotate,fold-batchnorm", PASSES))
    assert [str(unit.graph) for unit in program.units.values()] == before
    assert program.units["block.conv"].fed is None
    assert program.findings
    assert all(reason in str(finding) and finding.code == "batch-norm-kept" for finding in program.findings)


def test_under_a_policy_that_names_nothing_nothing_is_done() -> None:
    text = block(conv() + norm("bn", 4), AFTER).replace('"lp.site"() {name = "block.conv"', '"lp.site"() {name = "x"')
    program = parse_program(text)
    records = run_passes(program, parse_passes("annotate,fold-batchnorm", PASSES))
    assert [record.changed for record in records] == [False, False]
    assert not program.findings


def test_two_leaves_of_one_input_share_its_cast_after_folding() -> None:
    other = conv().replace("block.conv", "block.twin")
    body = f"""
    %c = "torch.call_module"(%x) {{target = "conv"}} : ({_CONV}) -> {_OUT}
    %y = "torch.call_module"(%c) {{target = "bn"}} : ({_OUT}) -> {_OUT}
    %d = "torch.call_module"(%x) {{target = "twin"}} : ({_CONV}) -> {_OUT}
    %z = "torch.call_module"(%d) {{target = "bn2"}} : ({_OUT}) -> {_OUT}
    "torch.return"(%y, %z) : ({_OUT}, {_OUT}) -> ()"""
    site = f'"lp.site"() {{name = "block.twin", spec = "{layer(E4M3)}"}} : () -> ()'
    text = block(site + conv() + other + norm("bn", 4) + norm("bn2", 4), body)
    check(
        run(text, "annotate,fold-batchnorm,insert-casts,share-casts,select-kernels"),
        """
// CHECK-LABEL: sym_name = "block.conv/fed"
// CHECK:      ^bb0(%x : {{.*}}, %lp_casts : !torch.value, %lp_affine : !torch.value):
// CHECK-COUNT-1: "lp.quantize"
// CHECK-LABEL: sym_name = "block#0"
// CHECK:      "lp.quantize"(%x)
// CHECK:      {target = "conv", args = "_, lp_casts=(_, None), lp_affine=(_, _)", lp.folded = "bn"}
// CHECK-NOT:  "lp.quantize"
// CHECK:      {target = "twin", args = "_, lp_casts=(_, None), lp_affine=(_, _)", lp.folded = "bn2"}
""",
    )


MUTATIONS = {
    "axis": ("axis = 0, groups = 1", "axis = 2, groups = 1", "`axis` must be 0 or 1"),
    "groups": ("axis = 0, groups = 1", "axis = 0, groups = 0", "`groups` must be at least 1"),
    "eps": ("eps = 1.0e-05", "eps = -1.0", "`eps` must not be negative"),
    "kind of eps": ("eps = 1.0e-05", "eps = 1", "attribute eps has another type. Expected a number"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_breaks_a_rule_is_rejected_twice(name: str) -> None:
    right, wrong, sentence = MUTATIONS[name]
    text = run(block(conv() + norm("bn", 4), AFTER), "annotate,fold-batchnorm")
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
