"""share-casts on small hand-made programs: what is merged, what is handed down, and what keeps two casts apart."""

import operator

import pytest
import torch
from torch import fx, nn

from lpcompile.frontends.leaves.find import leaf_graph
from passes.ir.gemm_nodes import read_gemm
from passes.ir.program import CASTS, SITE, Program, Unit, num_op
from passes.ir.verifier import verify
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES
from runtime.errors import PassError
from runtime.numerics.specs import GemmSpec, LayerSpec, QuantSpec
from runtime.ops.dialect import OPS

_E4M3 = LayerSpec(*(GemmSpec(QuantSpec.parse("e4m3"), QuantSpec.parse("e4m3")) for _ in range(3)))
_ROUGH = LayerSpec(*(GemmSpec(QuantSpec.parse("e5m2"), QuantSpec.parse("e5m2")) for _ in range(3)))
_RANDOM = LayerSpec(*(GemmSpec(QuantSpec.parse("e4m3 stochastic"), QuantSpec.parse("e4m3")) for _ in range(3)))


def _leaf(path: str) -> Unit:
    graph = leaf_graph(nn.Linear(4, 4))
    for node in graph.nodes:
        if read_gemm(node):
            node.meta[SITE] = path
    return Unit(path, graph, "leaf")


def _caller(in_place: bool = False) -> fx.Graph:
    """z = a(x) + b(x), with x += 1 between the calls if asked for."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_module("a", (x,))
    if in_place:
        graph.call_function(torch.Tensor.add_, (x, 1))
    second = graph.call_module("b", (x,))
    graph.output((graph.call_function(operator.add, (first, second)),))
    return graph


def _program(a: LayerSpec, b: LayerSpec, in_place: bool = False) -> Program:
    units = {
        "block.a": _leaf("block.a"),
        "block.b": _leaf("block.b"),
        "block#0": Unit("block", _caller(in_place), "module"),
    }
    return Program(units, {"block.a": a, "block.b": b})


def _run(program: Program, text: str = "annotate,insert-casts,share-casts,select-kernels") -> Program:
    run_passes(program, parse_passes(text, PASSES))
    return program


def test_two_leaves_with_one_input_cast_it_once() -> None:
    program = _run(_program(_E4M3, _E4M3))
    assert num_op(program, "lp.quantize") == 3  # x once in the caller, and each weight
    calls = [node for node in program.units["block#0"].graph.nodes if node.op == "call_module"]
    assert calls[0].kwargs[CASTS] == calls[1].kwargs[CASTS]
    assert all(call.args == (program.units["block#0"].graph.find_nodes(op="placeholder")[0],) for call in calls), (
        "x carries"
    )


def test_the_floor_of_a_fed_leaf_still_casts_for_itself() -> None:
    program = _run(_program(_E4M3, _E4M3))
    unit = program.units["block.a"]
    assert unit.fed is not None
    assert sum(node.target is OPS["lp.quantize"].run for node in unit.graph.nodes) == 2


@pytest.mark.parametrize(
    ("a", "b", "in_place"),
    [(_E4M3, _ROUGH, False), (_E4M3, _E4M3, True), (_RANDOM, _RANDOM, False)],
    ids=["another format", "an in-place op between", "stochastic rounding"],
)
def test_what_is_not_the_same_cast_stays_apart(a: LayerSpec, b: LayerSpec, in_place: bool) -> None:
    program = _run(_program(a, b, in_place))
    assert program.units["block.a"].fed is None
    assert not any(CASTS in node.kwargs for node in program.units["block#0"].graph.nodes)


def test_across_graph_leaves_modules_alone() -> None:
    program = _run(_program(_E4M3, _E4M3), "annotate,insert-casts,share-casts{across=graph},select-kernels")
    assert num_op(program, "lp.quantize") == 4
    with pytest.raises(PassError, match="Expected modules or graph"):
        parse_passes("share-casts{across=galaxy}", PASSES)


def test_shared_program_verifies_again() -> None:
    verify(_run(_program(_E4M3, _E4M3)))


@pytest.mark.parametrize("in_place", [False, True])
def test_equal_casts_of_one_graph_merge_unless_a_write_lies_between(in_place: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    attributes = {"spec": "e4m3 nearest_even", "site": 0, "slot": 0}
    first = graph.call_function(OPS["lp.quantize"].run, (x, None, None), attributes)
    graph.call_function(torch.Tensor.add_ if in_place else torch.Tensor.add, (x, 1))
    second = graph.call_function(OPS["lp.quantize"].run, (x, None, None), attributes)
    graph.output((first, second))
    program = _run(Program({"m#0": Unit("m", graph, "module")}, {}), "share-casts")
    assert num_op(program, "lp.quantize") == (2 if in_place else 1)
