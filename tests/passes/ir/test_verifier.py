"""The verifier: each way of spoiling one field of an lp node is rejected, with the sentence of the broken rule."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import fx, nn

from lpcompile.frontends.leaves.find import leaf_graph
from passes.ir.gemm_nodes import read_gemm
from passes.ir.program import SITE, Program, Unit
from passes.ir.verifier import verify
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES
from runtime.errors import VerifyError
from runtime.numerics.specs import LayerSpec
from runtime.ops.dialect import OPS

_ROW, _COLUMN = "e4m3 nearest_even row/amax", "e4m3 nearest_even column/amax"
_SPEC = (
    f"fwd: {_ROW} * {_ROW} -> fp32 -> fp32; bwd: {_ROW} * {_COLUMN} -> fp32 -> fp32; "
    f"grad: {_COLUMN} * {_COLUMN} -> fp32 -> fp32"
)


def _program() -> Program:
    graph = leaf_graph(nn.Linear(4, 4))
    for node in graph.nodes:
        if read_gemm(node):
            node.meta[SITE] = "leaf"
    program = Program({"leaf": Unit("leaf", graph, "leaf")}, {"leaf": LayerSpec.parse(_SPEC)})
    run_passes(program, parse_passes(PIPELINES["train"], PASSES))
    return program


def _node(program: Program, op: str) -> fx.Node:
    return next(node for node in program.units["leaf"].graph.nodes if node.target is OPS[op].run)


def _attribute(key: str, value: Any) -> Callable[[fx.Node], None]:
    return lambda node: setattr(node, "kwargs", {**node.kwargs, key: value})


def _without(key: str) -> Callable[[fx.Node], None]:
    return lambda node: setattr(node, "kwargs", {name: value for name, value in node.kwargs.items() if name != key})


def _operand(position: int, value: Any) -> Callable[[fx.Node], None]:
    return lambda node: setattr(node, "args", (*node.args[:position], value, *node.args[position + 1 :]))


MUTATIONS: dict[str, tuple[str, Callable[[fx.Node], None], str]] = {
    "unknown format": ("lp.quantize", _attribute("spec", "e4m4 nearest_even"), "must be a cast"),
    "unknown rounding": ("lp.quantize", _attribute("spec", "e4m3 upward"), "must be a cast"),
    "another format than the GEMM's": (
        "lp.quantize",
        _attribute("spec", "e5m2 nearest_even row/amax"),
        "cast to another spec",
    ),
    "a scale that the cast has not": ("lp.quantize", _attribute("spec", "e4m3 nearest_even"), "there where `spec` has"),
    "a scale of nothing": ("lp.scale", _attribute("spec", "e4m3 nearest_even"), "`spec` must have a scale"),
    "a number as text": ("lp.quantize", _attribute("site", "1"), "attribute site has another type"),
    "a GEMM without a scale": ("lp.gemm", _operand(4, None), "must have a scale where `spec` has one"),
    "cast without spec": ("lp.quantize", _without("spec"), "wrong attributes"),
    "cast without site": ("lp.quantize", _without("site"), "wrong attributes"),
    "unknown attribute": ("lp.scale", _attribute("colour", "red"), "wrong attributes"),
    "scale of nothing": ("lp.scale", _operand(0, None), "operand x is missing"),
    "cast of a constant": ("lp.quantize", _operand(0, 1.0), "operand x is missing"),
    "too few operands": ("lp.quantize", lambda node: setattr(node, "args", node.args[:2]), "wrong number of operands"),
    "too many operands": (
        "lp.gemm",
        lambda node: setattr(node, "args", (*node.args, None)),
        "wrong number of operands",
    ),
    "no carrier": ("lp.gemm", _operand(0, None), "operand lhs is missing"),
    "no state": ("lp.gemm", _operand(11, None), "operand state is missing"),
    "no cast": ("lp.gemm", _operand(3, None), "operand fwd_lhs is missing"),
    "unknown kind": ("lp.gemm", _attribute("kind", "lineal"), "`kind` must be one of"),
    "geometry on a linear": (
        "lp.gemm",
        _attribute("geometry", "stride=1 padding=0 dilation=1 groups=1"),
        "has a `geometry`",
    ),
    "convolution without geometry": ("lp.gemm", _attribute("kind", "conv"), "has a `geometry`"),
    "half a spec": ("lp.gemm", _attribute("spec", _SPEC.split("; bwd")[0]), "must hold the three GEMMs"),
    "two kernels": ("lp.gemm", _attribute("kernels", "fp32,fp32"), "one kernel per role"),
    "a scale inside the sum": ("lp.gemm", _attribute("spec", _SPEC.replace("column", "row")), "must be a power of two"),
    "swapped casts": (
        "lp.gemm",
        lambda node: setattr(node, "args", (*node.args[:9], *node.args[3:5], node.args[11])),
        "grad_lhs",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_rejected(name: str) -> None:
    op, mutate, sentence = MUTATIONS[name]
    program = _program()
    verify(program)
    mutate(_node(program, op))
    with pytest.raises(VerifyError, match=sentence):
        verify(program)


def test_the_error_says_where() -> None:
    program = _program()
    MUTATIONS["no carrier"][1](_node(program, "lp.gemm"))
    with pytest.raises(VerifyError, match=r"leaf: %\w+ = lp.gemm: operand lhs is missing. Expected a node. Got None"):
        verify(program)
