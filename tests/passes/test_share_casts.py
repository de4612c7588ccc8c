"""share-casts on small hand-made programs: what is merged, and what keeps two casts apart."""

import operator

import pytest
import torch
from torch import fx

from passes.ir.operands import operands_of
from passes.ir.program import SITE, Program, Unit, num_op
from passes.ir.verifier import verify
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES
from runtime.numerics.specs import GemmSpec, LayerSpec, QuantSpec
from runtime.ops.dialect import OPS

_E4M3 = LayerSpec(*(GemmSpec(QuantSpec.parse("e4m3"), QuantSpec.parse("e4m3")) for _ in range(3)))
_ROUGH = LayerSpec(*(GemmSpec(QuantSpec.parse("e5m2"), QuantSpec.parse("e5m2")) for _ in range(3)))
_RANDOM = LayerSpec(*(GemmSpec(QuantSpec.parse("e4m3 stochastic"), QuantSpec.parse("e4m3")) for _ in range(3)))


def _program(a: LayerSpec, b: LayerSpec, in_place: bool = False) -> Program:
    """z = x a^T + x b^T, with x += 1 between the products if asked for."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    products = []
    for name in ("a", "b"):
        product = graph.call_function(torch._C._nn.linear, (x, graph.get_attr(f"{name}.weight")))
        product.meta[SITE] = name
        products.append(product)
        if in_place:
            graph.call_function(torch.Tensor.add_, (x, 1))
    graph.output((graph.call_function(operator.add, tuple(products)),))
    return Program({"#0": Unit("", graph, "module")}, {"a": a, "b": b})


def _run(program: Program, text: str = "annotate,insert-casts,share-casts,select-kernels") -> Program:
    run_passes(program, parse_passes(text, PASSES))
    return program


def test_two_products_with_one_input_cast_it_once() -> None:
    program = _run(_program(_E4M3, _E4M3))
    assert num_op(program, "lp.quantize") == 3  # x once, and each weight
    graph = program.units["#0"].graph
    first, second = map(operands_of, graph.find_nodes(op="call_function", target=OPS["lp.gemm"].run))
    assert first["fwd_lhs"] is second["fwd_lhs"]
    assert first["lhs"] is second["lhs"] is graph.find_nodes(op="placeholder")[0], "x carries"


@pytest.mark.parametrize(
    ("a", "b", "in_place", "num_casts"),
    [(_E4M3, _ROUGH, False, 4), (_E4M3, _E4M3, True, 4), (_RANDOM, _RANDOM, False, 5)],
    ids=["another format", "an in-place op between", "stochastic rounding"],
)
def test_what_is_not_the_same_cast_stays_apart(a: LayerSpec, b: LayerSpec, in_place: bool, num_casts: int) -> None:
    assert num_op(_run(_program(a, b, in_place)), "lp.quantize") == num_casts  # GRAD casts x alike where FWD draws


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
