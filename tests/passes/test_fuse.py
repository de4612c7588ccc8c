"""fuse on programs as text: what becomes a part of a product, and what stays apart."""

import pytest

from passes.ir.dialect import verify_text
from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES
from runtime.errors import LpError
from tests.passes.golden import check, run
from tests.passes.programs_for_tests import E4M3, layer

_X, _Y = "tensor<8x4xf32>", "tensor<8x16xf32>"
_RELU, _GELU, _ADD = "torch.nn.functional.relu", "torch._C._nn.gelu", "operator.add"
_FUSE = "annotate,insert-casts,share-casts,fuse,select-kernels"


def block(body: str, flags: str = "", more: str = "") -> str:
    """A module called `block`, x (8, 4) and r (8, 16), that calls a linear leaf `fc`."""
    return f"""
"builtin.module"() ({{
  "lp.site"() {{name = "block.fc", spec = "{layer(E4M3)}"}} : () -> ()
  "torch.graph"() <{{sym_name = "block.fc", path = "block.fc", kind = "leaf"{flags}}}> ({{
  ^bb0(%x : {_X}):
    %w = "torch.get_attr"() {{target = "weight"}} : () -> tensor<16x4xf32>
    %y = "torch.call_function"(%x, %w) {{target = "torch._C._nn.linear", lp.site = "block.fc"}}
      : ({_X}, tensor<16x4xf32>) -> {_Y}
    "torch.return"(%y) : ({_Y}) -> ()
  }}) : () -> (){more}
  "torch.graph"() <{{sym_name = "block#0", path = "block", kind = "module"}}> ({{
  ^bb0(%x : {_X}, %r : {_Y}):
    %y = "torch.call_module"(%x) {{target = "fc"}} : ({_X}) -> {_Y}
{body}
  }}) : () -> ()
}}) : () -> ()
"""


def op(result: str, target: str, *operands: str, args: str = "") -> str:
    given = f', args = "{args}"' if args else ""
    types = ", ".join(_Y for _ in operands)
    return f"""
    %{result} = "torch.call_function"({", ".join(operands)}) {{target = "{target}"{given}}} : ({types}) -> {_Y}"""


def call(result: str, target: str, operand: str) -> str:
    return f'\n    %{result} = "torch.call_module"({operand}) {{target = "{target}"}} : ({_Y}) -> {_Y}'


def back(*values: str) -> str:
    return f'\n    "torch.return"({", ".join(values)}) : ({", ".join(_Y for _ in values)}) -> ()'


def act(name: str = "block.act", kind: str = "leaf", flags: str = "", function: str = _RELU) -> str:
    return f"""
  "torch.graph"() <{{sym_name = "{name}", path = "block.act", kind = "{kind}"{flags}}}> ({{
  ^bb0(%x : !torch.value):
    %y = "torch.call_function"(%x) {{target = "{function}"}} : (!torch.value) -> !torch.value
    "torch.return"(%y) : (!torch.value) -> ()
  }}) : () -> ()"""


def test_residual_and_relu_are_handed_to_the_leaf() -> None:
    text = run(block(op("s", _ADD, "%r", "%y") + op("z", _RELU, "%s") + back("%z")), _FUSE)
    check(
        text,
        """
// CHECK-LABEL: sym_name = "block.fc/fed"
// CHECK:      ^bb0(%x : tensor<8x4xf32>, %lp_residual : tensor<8x16xf32>, %lp_activation : !torch.value):
// CHECK:      "lp.gemm"(%x, %w, {{.*}}, %_lp_state, %lp_residual) {
// CHECK-SAME: activation = "relu"
// CHECK-LABEL: sym_name = "block#0"
// CHECK:      %y = "torch.call_module"(%x, %r) {target = "fc", args = "_, lp_residual=_, lp_activation='relu'"}
// CHECK-NEXT: "torch.return"(%y)
""",
    )
    assert print_program(parse_program(text)) == text
    verify_text(text)


FUSED = {
    "relu": (op("z", _RELU, "%y", args="_, inplace=True") + back("%z"), "", "'relu'"),
    "gelu": (op("z", _GELU, "%y") + back("%z"), "", "'gelu'"),
    "gelu-tanh": (op("z", _GELU, "%y", args="_, approximate='tanh'") + back("%z"), "", "'gelu-tanh'"),
    "in-place sum": (op("z", "torch.Tensor.__iadd__", "%y", "%r") + back("%z"), "", "lp_residual=_"),
    "a module": (call("z", "act", "%y") + back("%z"), act(), '\'relu\'", lp.folded = "act"'),
    "a recorded module": (call("z", "act", "%y") + back("%z"), act("block.act#0", "module"), 'lp.folded = "act"'),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_follows_at_once_becomes_a_part(name: str) -> None:
    body, more, handed = FUSED[name]
    text = run(block(body, more=more), _FUSE)
    check(
        text,
        f"""
// CHECK-LABEL: sym_name = "block#0"
// CHECK:      %y = "torch.call_module"(%x{{{{.*}}}}{handed}
// CHECK-NEXT: "torch.return"(%y)
""",
    )
    assert print_program(parse_program(text)) == text
    verify_text(text)


_CALLED_AGAIN = f'\n    %q = "torch.call_module"(%x) {{target = "fc"}} : ({_X}) -> {_Y}'
_NEGATED = op("n", "torch.neg", "%r")

APART = {
    "another consumer": op("z", _RELU, "%y") + back("%z", "%y"),
    "not at once": _NEGATED + op("z", _RELU, "%y") + back("%z", "%n"),
    "a sum with itself": op("z", _ADD, "%y", "%y") + back("%z"),
    "a sum into the other": op("z", "torch.Tensor.__iadd__", "%r", "%y") + back("%z"),
    "a scaled sum": op("z", "torch.add", "%y", "%r", args="_, _, alpha=2") + back("%z"),
    "a number": op("z", "operator.add", "%y", args="_, 1.0") + back("%z"),
    "another activation": op("z", "torch.tanh", "%y") + back("%z"),
    "a second call": op("z", _RELU, "%y") + _CALLED_AGAIN + back("%z", "%q"),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_would_change_bits_or_writes_elsewhere_stays_apart(name: str) -> None:
    _stays(block(APART[name]))


@pytest.mark.parametrize(
    "text",
    [
        block(op("z", _RELU, "%y") + back("%z"), flags=", is_observed = true"),
        block(call("z", "act", "%y") + back("%z"), more=act(flags=", is_observed = true")),
        block(call("z", "act", "%y") + back("%z"), more=act(function="torch.tanh")),
    ],
    ids=["hooks on the leaf", "hooks on the activation", "another module"],
)
def test_what_hooks_see_stays_apart(text: str) -> None:
    _stays(text)


def _stays(text: str) -> None:
    program = parse_program(text)
    (*_, record) = run_passes(program, parse_passes(_FUSE.removesuffix(",select-kernels"), PASSES))
    assert not record.changed
    assert "activation" not in print_program(program)
    assert "lp_residual" not in print_program(program)


def test_a_sum_of_another_shape_stays_apart() -> None:
    text = block(op("z", _ADD, "%y", "%r") + back("%z")).replace(f"%r : {_Y}", "%r : tensor<16xf32>")
    _stays(text.replace(f": ({_Y}, {_Y}) ->", f": ({_Y}, tensor<16xf32>) ->"))


def test_a_product_in_the_graph_itself_is_fused_without_a_call() -> None:
    text = f"""
"builtin.module"() ({{
  "lp.site"() {{name = "m.matmul_0", spec = "{layer(E4M3)}"}} : () -> ()
  "torch.graph"() <{{sym_name = "m#0", path = "m", kind = "module"}}> ({{
  ^bb0(%a : tensor<8x4xf32>, %b : tensor<4x16xf32>):
    %y = "torch.call_function"(%a, %b) {{target = "torch.matmul", lp.site = "m.matmul_0"}}
      : (tensor<8x4xf32>, tensor<4x16xf32>) -> {_Y}
    %z = "torch.call_function"(%y) {{target = "torch.nn.functional.relu"}} : ({_Y}) -> {_Y}
    "torch.return"(%z) : ({_Y}) -> ()
  }}) : () -> ()
}}) : () -> ()
"""
    check(
        run(text, _FUSE),
        '// CHECK: [[Y:%[a-z]+]] = "lp.gemm"({{.*}}activation = "relu"\n// CHECK-NEXT: "torch.return"([[Y]])',
    )


MUTATIONS = {
    "activation": ('activation = "relu"', 'activation = "rely"', "`activation` must be one of relu, gelu, gelu-tanh"),
    "residual": ("%lp_residual : tensor<8x16xf32>", "%lp_residual : tensor<8x15xf32>", "another type|shape and dtype"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_breaks_a_rule_is_rejected_twice(name: str) -> None:
    right, wrong, sentence = MUTATIONS[name]
    text = run(block(op("s", _ADD, "%r", "%y") + op("z", _RELU, "%s") + back("%z")), _FUSE)
    assert right in text
    with pytest.raises(LpError, match=sentence):
        parse_program(text.replace(right, wrong))
    with pytest.raises(LpError):
        verify_text(text.replace(right, wrong))
