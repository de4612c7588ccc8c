"""The printer: every program that a model gives prints, parses back to the same text, and verifies in xdsl."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from lpcompile.programs import program_of
from passes.finding import Finding
from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.ir.program import GROUP, NODE_META, REPEATED, SITE, SPEC, WEIGHT, Program, Unit
from passes.ir.types import META
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES
from runtime.errors import NotSupported
from runtime.kernels.registry import Choice
from runtime.numerics.specs import LayerSpec
from tests.models_for_tests import MODELS, build
from tests.passes.ir.xdsl_dialect import verify_text
from tests.passes.programs_for_tests import SCALED


class _Recurrent(nn.Module):
    """torch.export takes no bare nn.LSTM whose hx is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.lstm(x)[0]
        return y


def _lstm() -> tuple[nn.Module, dict[str, Any]]:
    return _Recurrent(), {"x": torch.randn(2, 3, 8)}


def _encoder() -> tuple[nn.Module, dict[str, Any]]:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), {"src": torch.randn(2, 3, 16)}


def _model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    if name in MODELS:
        example = build(name)
        return example.model, example.batch
    return _OTHERS[name]()


_OTHERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "lstm": _lstm,
    "encoder": _encoder,
}


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, "hfp8") for name in (*MODELS, *_OTHERS)), ("gpt2-eager", "fp8-rowwise"), ("resnet", "fp8-rowwise")],
)
def test_print_parse_print_is_the_identity_before_and_after_every_pass(name: str, policy: str) -> None:
    model, batch = _model(name)
    program = program_of(model, policy, example_kwargs=batch)
    assert program.specs, "the policy names something"

    def holds(program: Program) -> None:
        text = print_program(program)
        again = parse_program(text)
        assert print_program(again) == text
        for (_, graph), (_, parsed) in zip(program.graphs(), again.graphs(), strict=True):
            for node, read in zip(graph.nodes, parsed.nodes, strict=True):
                assert (node.op, node.name, node.target) == (read.op, read.name, read.target)
                assert {key: node.meta[key] for key in NODE_META if node.meta.get(key)} == {
                    key: read.meta[key] for key in NODE_META if read.meta.get(key)
                }
                assert str(node.args) == str(read.args)
                assert str(node.kwargs) == str(read.kwargs)
        assert dataclasses.replace(again, units={}) == dataclasses.replace(program, units={})
        verify_text(text)

    holds(program)
    run_passes(program, parse_passes(PIPELINES["train"], PASSES), lambda _, program: holds(program))


def test_every_pass_gives_the_same_on_the_parsed_program() -> None:
    """What a pass needs survives the text: running on from it ends in the same text."""
    model, batch = _model("gpt2-eager")
    program = program_of(model, "hfp8", example_kwargs=batch)
    parsed = program
    for item in PIPELINES["train"].split(","):
        parsed = parse_program(print_program(parsed))
        run_passes(parsed, parse_passes(item, PASSES))
    run_passes(program, parse_passes(PIPELINES["train"], PASSES))
    assert print_program(parsed) == print_program(program)


def _unary(value: Any, **meta: Any) -> Program:
    """One graph that hands `value` to a function."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.add, (x, value))
    y.meta.update(meta)
    graph.output((y,))
    return Program({"m#0": Unit("m", graph, "module")}, {})


def test_every_field_of_a_program_is_printed() -> None:
    program = _unary(1)
    spec, choice = LayerSpec.parse(SCALED), Choice("cpu", "cpu_bf16", "bitwise", 'because "so"; \\ \n and \u00e9')
    program.specs = {"a.b": spec, "c": spec}
    program.device, program.passes = "cuda", ["annotate", "fold-constants{lifetime=step}"]
    program.refusals = {"c": "a reason", "z": "no graph"}
    program.findings = [Finding("tied", "a.b", "it is risky", "another", True), Finding("x", "y", "z")]
    program.decisions = {"a.b": {"fwd": "a chunk of 64"}, "d": {"grad": "none"}}
    program.choices = {"a.b": {"fwd": choice, "grad": choice}}
    fields = {field.name for field in dataclasses.fields(Program) if field.init}
    printed = {"units", "specs", "device", "passes", "refusals", "choices", "findings", "decisions"}
    assert fields == printed, "a new field is to be printed"
    assert {field.name for field in dataclasses.fields(Unit)} == {"path", "graph", "kind"}
    again = parse_program(print_program(program))
    assert dataclasses.replace(again, units={}) == dataclasses.replace(program, units={})
    verify_text(print_program(program))


def test_meta_of_nodes_and_of_placeholders_survives() -> None:
    values = {SITE: "m.add", GROUP: 3, SPEC: LayerSpec.parse(SCALED), REPEATED: True, WEIGHT: True}
    assert values.keys() == NODE_META.keys()
    program = _unary(1, **values)
    next(iter(program.units["m#0"].graph.nodes)).meta[WEIGHT] = True
    x, y, _ = parse_program(print_program(program)).units["m#0"].graph.nodes
    assert {key: y.meta[key] for key in NODE_META} == values
    assert x.meta == {WEIGHT: True}


def test_types_of_tensors_survive() -> None:
    program = _unary(1)
    x, *_ = program.units["m#0"].graph.nodes
    for dtype in (torch.float32, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.int64):
        for shape in ((), (0,), (2, 3)):
            tensor = torch.empty(shape, dtype=dtype, device="meta")
            x.meta[META] = fx.passes.shape_prop._extract_tensor_metadata(tensor)
            text = print_program(program)
            read, *_ = parse_program(text).units["m#0"].graph.nodes
            assert (tuple(read.meta[META].shape), read.meta[META].dtype) == (shape, dtype)
            verify_text(text)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (object(), "a builtins.object"),
        (torch.zeros(1), "a torch.Tensor"),
        ([(None, {"a": {1}})], "a builtins.set"),
        ({1: 2}, "a .*dict"),
    ],
)
def test_what_has_no_text_is_an_error_that_names_the_node(value: Any, what: str) -> None:
    with pytest.raises(NotSupported, match=f"m#0: %add: {what} has no text. Expected plain values"):
        print_program(_unary(value))


def test_a_function_without_a_name_is_an_error_that_names_the_node() -> None:
    program = _unary(1)
    node = program.units["m#0"].graph.find_nodes(op="call_function", target=torch.add)[0]
    node.target = lambda x, y: x
    with pytest.raises(NotSupported, match=r"m#0: %add: the function <function .* has no text. Expected a"):
        print_program(program)


def test_an_unknown_key_of_meta_is_an_error_that_names_the_node() -> None:
    with pytest.raises(NotSupported, match=r"m#0: %add: meta key lp_colour has no text. Expected one of lp_site, "):
        print_program(_unary(1, lp_colour="red"))
