"""Arguments: whatever a call may be given beside tensors prints and reads back as itself."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from passes.ir.arguments import ArgumentsError, parse_arguments, print_arguments
from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.ir.program import Program, Unit
from tests.passes.ir.xdsl_dialect import verify_text

_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(),
    st.just(...),
    st.sampled_from(_DTYPES),
    st.sampled_from([torch.strided, torch.channels_last, torch.contiguous_format, torch.sparse_coo]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")]),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3)),
)
_INDICES = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))
_VALUES = st.recursive(
    _LEAVES | st.builds(slice, _INDICES, _INDICES, _INDICES),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=8,
)
_KEYWORDS = st.dictionaries(st.sampled_from(["dim", "dtype", "_", "keepdim"]), _VALUES, max_size=3)


@settings(deadline=None)
@given(st.lists(_VALUES, max_size=4).map(tuple), _KEYWORDS)
def test_values_read_back_as_themselves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    text, operands = print_arguments(args, kwargs)
    assert not operands
    assert text.isascii()
    read = parse_arguments(text, [])
    assert _exactly(read) == _exactly((args, kwargs))


@settings(deadline=None)  # the first case imports xdsl
@given(st.lists(_VALUES, max_size=3))
def test_values_survive_the_whole_text_and_xdsl(values: list[Any]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.add, (x, *values), {"out": (x, [slice(x, None, x)], {"a": x})})
    graph.output((y, None, [x]))
    text = print_program(Program({"m#0": Unit("m", graph, "module")}, {}))
    parsed = parse_program(text)
    assert print_program(parsed) == text
    read = next(node for node in parsed.units["m#0"].graph.nodes if node.op == "call_function")
    assert _exactly(read.args[1:]) == _exactly(y.args[1:])
    assert str(read.kwargs) == str(y.kwargs)
    verify_text(text)


def _exactly(value: Any) -> Any:
    """A value whose equality is sameness: 1 is not True, -0.0 is not 0.0, NaN is NaN, a list is no tuple."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else (math.copysign(1, value), value)
    if isinstance(value, complex):
        return "complex", _exactly(value.real), _exactly(value.imag)
    if isinstance(value, (list, tuple)):
        return "list" if isinstance(value, list) else "tuple", [_exactly(item) for item in value]
    if isinstance(value, dict):
        return "dict", [(key, _exactly(item)) for key, item in value.items()]
    if isinstance(value, slice):
        return "slice", [_exactly(item) for item in (value.start, value.stop, value.step)]
    return type(value), copy.copy(value)


@pytest.mark.parametrize(
    "text", ["x", "f(1)", "torch.add", "_", "1 + 1", "lambda: 1", "*[1]", "**{}", "torch.device(1, 2, 3)"]
)
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(ArgumentsError):
        parse_arguments(text, [])


def test_a_text_is_never_run() -> None:
    with pytest.raises(ArgumentsError):
        parse_arguments("__import__('os').getcwd()", [])
