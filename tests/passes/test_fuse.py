"""fuse on programs as text: what becomes a part of a product, and what stays apart."""

import pytest

from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES
from runtime.errors import LpError
from tests.passes.golden import check, run
from tests.passes.ir.xdsl_dialect import verify_text
from tests.passes.programs_for_tests import E4M3, layer

_X, _Y = "tensor<8x4xf32>", "tensor<8x16xf32>"
_RELU, _GELU, _ADD = "torch.nn.functional.relu", "torch._C._nn.gelu", "operator.add"
_FUSE = "annotate,insert-casts,share-casts,fuse,select-kernels"


def block(body: str) -> str:
    """A graph of x (8, 4) and r (8, 16) that begins with a linear product %y, (8, 16)."""
    return f"""
"builtin.module"() ({{
  "lp.site"() {{name = "fc", spec = "{layer(E4M3)}"}} : () -> ()
  "torch.graph"() <{{sym_name = "#0", path = "", kind = "module"}}> ({{
  ^bb0(%x : {_X}, %r : {_Y}):
    %w = "torch.get_attr"() {{target = "fc.weight"}} : () -> tensor<16x4xf32>
    %y = "torch.call_function"(%x, %w) {{target = "torch._C._nn.linear", lp.site = "fc"}}
      : ({_X}, tensor<16x4xf32>) -> {_Y}
{body}
  }}) : () -> ()
}}) : () -> ()
"""


def op(result: str, target: str, *operands: str, args: str = "") -> str:
    given = f', args = "{args}"' if args else ""
    types = ", ".join(_Y for _ in operands)
    return f"""
    %{result} = "torch.call_function"({", ".join(operands)}) {{target = "{target}"{given}}} : ({types}) -> {_Y}"""


def back(*values: str) -> str:
    return f'\n    "torch.return"({", ".join(values)}) : ({", ".join(_Y for _ in values)}) -> ()'


def test_residual_and_relu_become_a_part() -> None:
    text = run(block(op("s", _ADD, "%r", "%y") + op("z", _RELU, "%s") + back("%z")), _FUSE)
    check(
        text,
        """
// CHECK:      %y = "lp.gemm"(%x, %w, {{.*}}, %_lp_state, %r) {
// CHECK-SAME: activation = "relu"
// CHECK-NEXT: "torch.return"(%y)
""".replace("%y", "[[Y:%[a-z0-9_]+]]", 1).replace("%y", "[[Y]]"),
    )
    assert print_program(parse_program(text)) == text
    verify_text(text)


_NEGATED = op("n", "torch.neg", "%r")
FUSED = {
    "relu": (op("z", _RELU, "%y", args="_, inplace=True") + back("%z"), 'activation = "relu"'),
    "relu in place": (op("z", "torch.relu_", "%y") + back("%z"), 'activation = "relu"'),
    "gelu": (op("z", _GELU, "%y") + back("%z"), 'activation = "gelu"'),
    "gelu-tanh": (op("z", _GELU, "%y", args="_, approximate='tanh'") + back("%z"), 'activation = "gelu-tanh"'),
    "in-place sum": (op("z", "torch.Tensor.__iadd__", "%y", "%r") + back("%z"), "%_lp_state, %r)"),
    "what is added comes later": (_NEGATED + op("z", _ADD, "%y", "%n") + back("%z"), "%_lp_state, %n)"),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_follows_becomes_a_part(name: str) -> None:
    body, fused = FUSED[name]
    text = run(block(body), _FUSE)
    assert fused in text
    check(text, '// CHECK: [[Y:%[a-z0-9_]+]] = "lp.gemm"\n// CHECK-NEXT: "torch.return"([[Y]])')
    assert print_program(parse_program(text)) == text
    verify_text(text)


APART = {
    "another consumer": op("z", _RELU, "%y") + back("%z", "%y"),
    "a write between": op("n", "torch.Tensor.add_", "%r", args="_, 1") + op("z", _RELU, "%y") + back("%z", "%n"),
    "a sum with itself": op("z", _ADD, "%y", "%y") + back("%z"),
    "a sum into the other": op("z", "torch.Tensor.__iadd__", "%r", "%y") + back("%z"),
    "a scaled sum": op("z", "torch.add", "%y", "%r", args="_, _, alpha=2") + back("%z"),
    "a number": op("z", "operator.add", "%y", args="_, 1.0") + back("%z"),
    "another activation": op("z", "torch.tanh", "%y") + back("%z"),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_would_change_bits_or_writes_elsewhere_stays_apart(name: str) -> None:
    _stays(block(APART[name]))


def _stays(text: str) -> None:
    program = parse_program(text)
    (*_, record) = run_passes(program, parse_passes(_FUSE.removesuffix(",select-kernels"), PASSES))
    assert not record.changed
    assert "activation" not in print_program(program)


def test_a_sum_of_another_shape_stays_apart() -> None:
    text = block(op("z", _ADD, "%y", "%r") + back("%z")).replace(f"%r : {_Y}", "%r : tensor<16xf32>")
    _stays(text.replace(f": ({_Y}, {_Y}) ->", f": ({_Y}, tensor<16xf32>) ->"))


MUTATIONS = {
    "activation": ('activation = "relu"', 'activation = "rely"', "`activation` must be one of relu, gelu, gelu-tanh"),
    "residual": ("%r : tensor<8x16xf32>", "%r : tensor<8x15xf32>", "another type|shape and dtype"),
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
