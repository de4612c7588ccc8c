"""Fed leaves: which calls are of a leaf, and what its graph reads once a caller casts for it."""

import operator

from torch import fx

from passes.fed_leaves import QUANTIZE, casts_of_input, feed, leaf_of
from passes.ir.parser import parse_program
from passes.ir.program import CASTS, Program, Unit
from passes.ir.verifier import verify
from tests.passes.golden import run
from tests.passes.programs_for_tests import SCALED, layer, two_leaves


def _program(spec: str) -> Program:
    return parse_program(run(two_leaves(spec), "annotate,insert-casts"))


def _calls(program: Program) -> list[fx.Node]:
    return list(program.units["block#0"].graph.find_nodes(op="call_module"))


def test_a_fed_graph_reads_the_pairs_in_the_order_of_the_casts() -> None:
    program = _program(SCALED)
    leaf, call = program.units["block.a"], _calls(program)[0]
    casts = casts_of_input(leaf.graph)
    assert [cast.kwargs["slot"] for cast in casts] == [0, 3]
    x = call.args[0]
    assert isinstance(x, fx.Node)
    feed(call, leaf, [(x, x), (None, None)])
    assert call.kwargs == {CASTS: (x, x, None, None)}
    assert leaf.fed is not None
    assert len(casts_of_input(leaf.graph)) == 2, "the floor casts for itself"
    assert not casts_of_input(leaf.fed)
    reads = [node.args[1] for node in leaf.fed.find_nodes(op="call_function", target=operator.getitem)]
    assert sorted(reads) == [0, 1, 2, 3]  # type: ignore[type-var]
    verify(program)


def test_stochastic_casts_stay_with_the_leaf() -> None:
    program = _program(layer("e4m3 stochastic"))
    graph = program.units["block.a"].graph
    assert graph.find_nodes(op="call_function", target=QUANTIZE)
    assert not casts_of_input(graph)


def test_only_a_call_with_one_tensor_is_of_a_leaf() -> None:
    program = _program(layer("e4m3 nearest_even"))
    unit, call = program.units["block#0"], _calls(program)[0]
    assert leaf_of(program, unit, call) is program.units["block.a"]
    call.kwargs = {"other": 1}
    assert leaf_of(program, unit, call) is None
    call.kwargs = {}
    call.target = "c"
    assert leaf_of(program, unit, call) is None
    elsewhere = Unit("", unit.graph, "module")
    call.target = "block.b"
    assert leaf_of(program, elsewhere, call) is program.units["block.b"]
