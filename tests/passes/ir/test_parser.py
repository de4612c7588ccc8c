"""The parser: what is wrong with a text is said with its line and column, by us and by xdsl."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.pipelines import PIPELINES
from runtime.errors import LpError, ParseError, VerifyError
from tests.passes.golden import run
from tests.passes.ir.xdsl_dialect import verify_text
from tests.passes.programs_for_tests import linear, two_layers


def _text() -> str:
    return run(linear(), PIPELINES["train"])


MUTATIONS: dict[str, tuple[str, str, str]] = {
    # name: (regular expression of what is replaced, first match; what with; what our sentence says)
    "op name": (r'"lp\.quantize"', '"lp.quantise"', r'"lp.quantise" is no operation of a graph. Try "lp.quantize"'),
    "op of another dialect": (r'"lp\.scale"', '"arith.addf"', r'"arith.addf" is no operation'),
    "attribute name": (r"slot = 0", "slit = 0", r'no attribute slit. Try "slot"'),
    "meta name": (r"lp\.site =", "lp.sit =", r'no attribute lp.sit. Try "lp.site"'),
    "attribute left out": (r", site = 0", "", "needs the attribute site"),
    "attribute of another type": (r"slot = 0", 'slot = "0"', "attribute slot has another type. Expected an integer"),
    "attribute twice": (r"slot = 0", "slot = 0, slot = 1", "attribute slot is there twice"),
    "unknown format": (r'spec = "e4m3 nearest_even row/amax"', 'spec = "e4m4 nearest_even row/amax"', "must be a cast"),
    "another format": (
        r'(?<=quantize"\(%x, %scale\) \{)spec = "e4m3 nearest_even row/amax"',
        'spec = "e5m2 nearest_even row/amax"',
        "has another type",
    ),
    "half a spec": (r'kernels = "[^"]*"', 'kernels = "fp32"', "`kernels` must name one kernel per role"),
    "kernels that are none": (
        r'kernels = "[^"]*"',
        'kernels = "a,b,c"',
        "`kernels` must be empty before they are chosen",
    ),
    "slot that is none": (r"slot = 0", "slot = 4", "`slot` must be 0 or 1 of FWD's operands"),
    "backend that is none": (r'backend = "[a-z_]*"', 'backend = "tpu"', "not a choice. Expected backend cpu or"),
    "fidelity that is none": (
        r'fidelity = "[a-z-]*"',
        'fidelity = "perfect"',
        "not a choice. Expected fidelity bitwise",
    ),
    "half a choice": (r'backend = "[a-z_]*", ', "", "not a choice. Expected backend, kernel, fidelity, reason"),
    "pass that is none": (r'passes = "[^"]*"', 'passes = "nosuch"', 'not passes. Expected .* "nosuch" is not a pass'),
    "option that is none": (r"place-regions{carriers=", "place-regions{carrier=", 'has no option "carrier"'),
    "device that is none": (r'device = "cpu"', 'device = "tpu"', "not device. Expected a type of device, such as cpu"),
    "device with a number": (r'device = "cpu"', 'device = "cuda:0"', "not device. Expected a type of device without"),
    "unknown kind": (r'kind = "linear"', 'kind = "lineal"', "`kind` must be one of"),
    "operand left out": (r"\(%x, %w, %b, %quantize", "(%x, %w, %quantize", "wrong number of operand"),
    "operand twice": (r"\"lp\.scale\"\(%x\)", '"lp.scale"(%x, %x)', "wrong number of operand"),
    "another operand": (r'"bias", "fwd_lhs", "fwd_lhs_scale"', '"bias", "fwd_lhs", "fwd_rhs"', "wrong|is no|must"),
    "operands moved": (r'"fwd_lhs", "fwd_lhs_scale"', '"fwd_lhs_scale", "fwd_lhs"', "wrong operands. Expected names"),
    "an operand that is none": (r'operands = \["x", "s"\]', 'operands = ["x", "t"]', "wrong operands. Expected names"),
    "unknown value": (r"lp\.scale\"\(%x\)", 'lp.scale"(%y)', "%y is not defined before its use"),
    "operand of another type": (r"\(%x, %w, %b,", "(%x, %w, %scale,", "%scale has another type"),
    "shape of a result": (r"-> tensor<8x1xf32>", "-> tensor<8x2xf32>", "%scale has another type"),
    "dtype of a result": (r"-> tensor<8x1xf32>", "-> tensor<8x1xf16>", "%scale has another type"),
    "shape of a use": (r"\(tensor<8x4xf32>, tensor<8x1xf32>\)", "(tensor<8x5xf32>, tensor<8x1xf32>)", "%x has another"),
    "shape of the GEMM": (r"-> tensor<8x16xf32>", "-> tensor<8x17xf32>", "has another type|not what its operands"),
    "format of a quantized type": (r'-> !lp\.quant<"e4m3"', '-> !lp.quant<"e5m2"', "%quantize has another type"),
    "granularity of a quantized type": (
        r'-> !lp\.quant<"e4m3", "row", 1',
        '-> !lp.quant<"e4m3", "column", 0',
        "another",
    ),
    "axis of a quantized type": (r'-> !lp\.quant<"e4m3", "row", 1', '-> !lp.quant<"e4m3", "row", 0', "another type"),
    "storage of a quantized type": (r"tensor<8x4xbf16>> *\n", "tensor<8x4xf32>>\n", "%quantize has another type"),
    "number of results": (r"%scale = ", "%scale, %more = ", "has one result"),
    "name twice": (r"%scale_2 = ", "%scale = ", "%scale is defined twice"),
    "type that is none": (r"-> !lp\.state", "-> !lp.stat", "cannot read this. Expected a type"),
    "state of another type": (r"-> !lp\.state", "-> !torch.value", "%_lp_state has another type"),
    "kind of graph": (r'kind = "leaf"', 'kind = "leave"', "not a kind of graph. Expected leaf or module"),
    "no return": (r'    "torch\.return".*\n', "", "a graph ends with torch.return"),
    "no bracket": (r'"lp\.scale"\(%x\)', '"lp.scale"(%x', r"cannot read this. Expected `\)`"),
    "spec of a site": (r'(name = "fc", spec = "fwd: )e4m3', r"\1e4m4", "e4m4"),
}


def test_a_text_that_names_kernels_as_methods_is_read() -> None:
    text = run(two_layers(), PIPELINES["train"])
    old = text.replace("kernels = ", "methods = ").replace(', kernel = "', ', method = "')
    assert old != text
    assert print_program(parse_program(old)) == text


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_rejected_twice(name: str) -> None:
    pattern, new, sentence = MUTATIONS[name]
    text = _text()
    mutated, count = re.subn(pattern, new, text, count=1)
    assert count == 1, "the mutation changes something"
    with pytest.raises(ParseError, match=rf"^file\.lpir:\d+:\d+: .*(?:{sentence})"):
        parse_program(mutated, "file.lpir")
    with pytest.raises(VerifyError):
        verify_text(mutated, "file.lpir")


SITE_MUTATIONS: dict[str, tuple[str, str | Callable[[re.Match[str]], str], str]] = {
    # of one lp.gemm or cast against its site: what xdsl, which looks at one operation at a time, cannot say
    "spec of another site": (
        r'(kind = "linear", spec = "fwd: e4m3 nearest_even row/)amax( [^;]* row/)amax',
        r"\1pow2\2pow2",
        "cast to another spec|`spec` must be that of its site",
    ),
    "spec in which nothing is seen": (
        r'(kind = "linear", spec = "[^"]*bwd: )e4m3',
        r"\1e5m2",
        "lp.gemm: `spec` must be that of its site. Expected fwd: .* Got fwd: ",
    ),
    "another lp.spec": (r'(lp\.spec = "[^"]*bwd: )e4m3', r"\1e5m2", "must be that of its site. .* Got lp.spec fwd"),
    "site number of a GEMM": (
        r'(kernels = "[^"]*", site = )0',
        r"\g<1>3",
        "must be those of a GEMM .* Expected site 3 slot 0",
    ),
    "site number of all": (
        r"(?s)site = 0(.*)",
        lambda m: m[0].replace("site = 0", "site = 3"),
        "be the number of its site. Expected 0. Got 3",
    ),
    "slot of a kept scale": (
        r'(constant_scale".*slot = )1',
        r"\g<1>0",
        "a kept scale must have the `site` and `slot` of its cast",
    ),
    "site number of a cast": (r"(row/amax\", site = )0", r"\g<1>3", "must be those of a GEMM .* Got site 3 slot 0"),
    "slot of a cast": (r"slot = 0", "slot = 2", "must be those of a GEMM .* Expected site 0 slot 0. Got site 0 slot 2"),
    "no such site": (
        r'(lp\.gemm.*lp\.site = )"fc"',
        r'\1"fd"',
        'must name a site that the policy names. Got .fd.. Try "fc"',
    ),
    "no site": (r'(lp\.gemm.*), lp\.site = "fc"', r"\1", "must name a site that the policy names. Got None"),
    "site that nobody names": (
        r'({name = "fc"), spec = "[^"]*"',
        r'\1, refusal = ""',
        "that the policy names. Got 'fc'",
    ),
    "kernels that were not chosen": (
        r'(kind = "linear".*kernels = )"[^"]*"',
        r'\1"as_is,as_is,as_is"',
        "`kernels` must be those of the backends chosen for its site",
    ),
}


@pytest.mark.parametrize("name", SITE_MUTATIONS)
def test_a_gemm_that_is_not_what_its_site_says_is_rejected(name: str) -> None:
    pattern, new, sentence = SITE_MUTATIONS[name]
    mutated, count = re.subn(pattern, new, _text(), count=1)
    assert count == 1, "the mutation changes something"
    with pytest.raises(ParseError, match=rf"^file\.lpir:\d+:\d+: .*(?:{sentence})"):
        parse_program(mutated, "file.lpir")


CALL_MUTATIONS: dict[str, tuple[str, str, str]] = {
    "function": (r"operator\.add", "operator.addd", '"operator.addd" is not a function. Try operator.add'),
    "module": (r"operator\.add", "operatr.add", '"operatr.add" is not a function. Try operator'),
    "too many holes": (r'target = "operator.add"', r'\g<0>, args = "_, _, _"', "Expected an operand for each `_`"),
    "too few holes": (r'target = "operator.add"', r'\g<0>, args = "_"', "Expected as many `_` as operands, 2"),
    "no arguments": (r'target = "operator.add"', r'\g<0>, args = "_, _ ["', "Expected arguments as Python"),
    "a call in the arguments": (r'target = "operator.add"', r'\g<0>, args = "_, _, open(1)"', r"Got open\(1\)"),
    "another number of types": (
        r"\(tensor<8x4xf32>, tensor<8x4xf32>\)",
        "(tensor<8x4xf32>)",
        "Expected 2, one for each",
    ),
    "an unknown attribute": (r'target = "operator.add"', r'\g<0>, colour = "red"', "has no attribute colour"),
}


@pytest.mark.parametrize("name", CALL_MUTATIONS)
def test_every_mutation_of_a_call_is_rejected_twice(name: str) -> None:
    pattern, new, sentence = CALL_MUTATIONS[name]
    lines = print_program(parse_program(two_layers())).split("\n")
    number = next(index for index, line in enumerate(lines) if "operator.add" in line)
    lines[number], count = re.subn(pattern, new, lines[number], count=1)
    assert count == 1
    with pytest.raises(ParseError, match=rf"^file\.lpir:{number + 1}:\d+: .*{sentence}"):
        parse_program("\n".join(lines), "file.lpir")
    with pytest.raises(VerifyError):
        verify_text("\n".join(lines), "file.lpir")


def test_the_column_is_that_of_the_mistake() -> None:
    text = '"builtin.module"() ({\n  "lp.site"() {name = "a", sepc = "x"} : () -> ()\n}) : () -> ()\n'
    with pytest.raises(ParseError) as caught:
        parse_program(text, "a.lpir")
    error = caught.value
    assert (error.where, error.what) == ("a.lpir:2:28", "lp.site has no attribute sepc")
    assert error.hint.startswith('"spec"? Known: name, spec, refusal')


@pytest.mark.parametrize(
    "text", ["", "builtin.module", '"builtin.module"() ({', '"builtin.module"() ({}) : () -> () 1', "{"]
)
def test_what_is_no_module_is_a_parse_error(text: str) -> None:
    with pytest.raises(LpError, match=r"<text>:\d+:\d+: cannot read this. Expected"):
        parse_program(text)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_is_changed_in_a_text_it_is_read_or_the_error_says_where(data: st.DataObject) -> None:
    """One token put in, or in the place of another: no other exception, and what is read prints and reads again."""
    tokens = re.findall(r"\w+|\W", _text())
    place = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.sampled_from([*sorted(set(tokens)), "-1", "1.5", "\\", "none", "%x", "9" * 20, "\u00e9", ""]))
    tokens[place : place + data.draw(st.integers(0, 1))] = [other]
    try:
        program = parse_program("".join(tokens), "file.lpir")
    except ParseError as error:
        where = error.where
    else:
        text = print_program(program)
        assert print_program(parse_program(text)) == text
        return
    assert re.fullmatch(r"file\.lpir:\d+:\d+", where)
