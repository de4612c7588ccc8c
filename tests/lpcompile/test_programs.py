"""Programs: a text and a state_dict are the model; graphs of another model are refused."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile
from lpcompile.compiled import find_compiled, get_compiled
from lpcompile.errors import LpError, ParseError
from lpcompile.programs import install_text, program_of
from passes.ir.printer import print_program
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES
from tests.lpcompile.program_results import calls_by_graph, forward_backward
from tests.models_for_tests import Example, build

_ROOT = Path(__file__).resolve().parents[2]


def _text(example: Example, policy: str) -> str:
    program = program_of(example.model, policy, example_kwargs=example.batch)
    run_passes(program, parse_passes(PIPELINES["train"], PASSES))
    return print_program(program)


@pytest.mark.parametrize(
    ("name", "policy"), [("gpt2-sdpa", "hfp8"), ("llama-eager", "fp8-rowwise"), ("resnet", "int8")]
)
def test_a_text_in_a_fresh_process_gives_the_same_bits(name: str, policy: str, tmp_path: Path) -> None:
    example = build(name)
    torch.save(example.model.state_dict(), tmp_path / "model.pt")
    lpcompile(example.model, policy, example_kwargs=example.batch)
    (tmp_path / "program.lpir").write_text(_text(build(name), policy))
    wanted = forward_backward(example)
    command = [sys.executable, "-m", "tests.lpcompile.program_worker", name, str(tmp_path)]
    subprocess.run(
        command,
        check=True,
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
    )
    got = torch.load(tmp_path / "result.pt")
    assert wanted["gemm_calls"] > 0
    assert got.keys() == wanted.keys()
    assert len(wanted) > 10
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key


def test_another_text_gives_other_bits() -> None:
    """The graphs of the text are what runs: int8 instead of hfp8 in it is int8 instead of hfp8 in the model."""
    results = []
    for policy in ("hfp8", "int8"):
        example = build("gpt2-eager")
        install_text(example.model, _text(example, policy), example_kwargs=example.batch)
        results.append(forward_backward(example))
    assert not torch.equal(results[0]["output"], results[1]["output"])


def test_program_of_leaves_the_model_alone() -> None:
    example = build("gpt2-eager")
    before = copy.deepcopy(example.model.state_dict())
    program_of(example.model, "hfp8", example_kwargs=example.batch)
    assert find_compiled(example.model) is None
    assert all(torch.equal(value, before[key]) for key, value in example.model.state_dict().items())


def test_a_text_of_another_model_is_refused() -> None:
    gpt2, resnet = build("gpt2-eager"), build("resnet")
    text = _text(gpt2, "hfp8")
    with pytest.raises(LpError, match=r"gpt.lpir: its graph takes other inputs than the model"):
        install_text(resnet.model, text, example_kwargs=resnet.batch, file="gpt.lpir")
    assert find_compiled(resnet.model) is None


def test_a_text_needs_the_example_inputs() -> None:
    example = build("llama-eager")
    text = _text(example, "fp8-rowwise")
    with pytest.raises(LpError, match="the example inputs that the text was made with"):
        install_text(example.model, text)


def test_a_text_on_which_no_pass_ran_is_refused() -> None:
    example = build("llama-eager")
    text = print_program(program_of(example.model, "hfp8", example_kwargs=example.batch))
    with pytest.raises(LpError, match="on which passes have run"):
        install_text(example.model, text, example_kwargs=example.batch)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(8, 8)
        self.q = self.p

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.p(x) ** 2)


def test_a_child_in_two_places_is_found_in_both() -> None:
    torch.manual_seed(0)
    model, x = _Twice().eval(), torch.randn(3, 8)
    program = program_of(model, "hfp8", (x,))
    run_passes(program, parse_passes(PIPELINES["infer"], PASSES))
    text = print_program(program).replace('"p.weight"', '"q.weight"')
    twin = install_text(copy.deepcopy(model), text, (x,))
    with torch.no_grad():
        assert torch.equal(twin(x), lpcompile(model, "hfp8", (x,), mode="infer")(x))
    assert calls_by_graph(twin) == (1, 0)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), twin(x))


def test_a_mistake_in_the_text_says_where() -> None:
    example = build("resnet")
    text = _text(example, "int8").replace('"lp.gemm"', '"lp.gem"', 1)
    with pytest.raises(ParseError, match=r'^r.lpir:\d+:\d+: "lp.gem" is no operation of a graph. Try "lp.gemm"'):
        install_text(example.model, text, example_kwargs=example.batch, file="r.lpir")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            '"stem.0.weight"',
            '"stern.0.weight"',
            r'\w+ has no attribute "stern.0.weight". Try "stem.0.weight"\? Known: .*stem.0.weight',
        ),
        ('"stem.0.weight"', '"stem.0.wait"', r'\w+ has no attribute "stem.0.wait". Try "stem.0.weight"'),
    ],
)
def test_a_name_that_the_model_does_not_have_is_refused_before_it_is_called(old: str, new: str, sentence: str) -> None:
    example = build("resnet")
    text = _text(example, "int8")
    assert old in text
    with pytest.raises(LpError, match=rf"^r.lpir: %\w+: {sentence}"):
        install_text(example.model, text.replace(old, new, 1), example_kwargs=example.batch, file="r.lpir")
    assert find_compiled(example.model) is None


def test_a_leaf_of_several_products_is_installed_from_a_text() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), torch.randn(2, 5, 16)
    program = program_of(model, "bf16", (x,))
    run_passes(program, parse_passes(PIPELINES["train"], PASSES))
    twin = install_text(copy.deepcopy(model), print_program(program), (x,))
    assert torch.equal(twin(x), lpcompile(model, "bf16", (x,))(x))
    assert get_compiled(twin).state.gemm_calls == 6
