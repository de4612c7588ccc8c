"""Compiling anew: what fails leaves the model as it was compiled before; parts of compiled models are refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile, report
from lpcompile.api import restore, run_state
from lpcompile.errors import LpError
from lpcompile.frontends.install import installed
from lpcompile.programs import install_text, program_of
from passes.ir.printer import print_program
from tests.lpcompile.test_changed_children import Net

REFUSED = """
version: 1
rules:
  - match: {op: linear}
    fwd: {x: {format: e4m3, scale: {granularity: column}}, w: e4m3}
"""


def _text_of_another() -> str:
    return print_program(program_of(nn.Sequential(nn.Linear(2, 2)), "fp32"))


FAILURES: dict[str, Callable[[nn.Module, Tensor, Path], Any]] = {
    "refused under strict": lambda model, x, file: lpcompile(model, file, strict=True),
    "no such policy": lambda model, x, file: lpcompile(model, "hfp9"),
    "examples that do not fit": lambda model, x, file: lpcompile(model, "int8", example_inputs=(x[:, :3],)),
    "not an argument list": lambda model, x, file: lpcompile(model, "int8", example_inputs=x),
    "a text of another model": lambda model, x, file: install_text(model, _text_of_another(), (x,)),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_leaves_the_earlier_compilation(name: str, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(REFUSED)
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 16)
    lpcompile(model, "hfp8", example_inputs=(x,))
    expected, state, before = model(x), run_state(model), installed(model)
    report(model)  # counts since the last report begin anew
    hooks, text = dict(model._forward_pre_hooks), report(model).to_text()
    with pytest.raises((LpError, RuntimeError)):
        FAILURES[name](model, x, file)
    assert report(model).to_text() == text
    assert torch.equal(model(x), expected)
    assert run_state(model) is state
    assert installed(model) is before
    assert model._forward_pre_hooks == hooks


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_leaves_a_plain_model_plain(name: str, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(REFUSED)
    model, x = Net(), torch.randn(4, 16)
    before = [(type(module), set(vars(module))) for module in model.modules()]
    with pytest.raises((LpError, RuntimeError)):
        FAILURES[name](model, x, file)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before


def test_a_closed_fast_path_stays_closed_after_a_failure() -> None:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 4, 16)
    lpcompile(model, "hfp8", example_inputs=(x,))
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(AssertionError, match="embedding dimension"):
            lpcompile(model, "int8", example_inputs=(x[..., :3],))
        assert torch.equal(model(x), expected)


def _nested() -> tuple[nn.Module, nn.Module]:
    parent = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))
    return parent, parent[0]


@pytest.mark.parametrize("policy", ["hfp8", "fp32"])
def test_a_compiled_part_is_refused(policy: str) -> None:
    parent, child = _nested()
    lpcompile(child, policy)
    expected = report(child).to_text()
    with pytest.raises(LpError, match=r"0, Sequential: this module is compiled already.* Try restore\(that module\)"):
        lpcompile(parent, "fp8-rowwise", strict=True)
    assert report(child).to_text() == expected
    restore(child)
    lpcompile(parent, "fp8-rowwise", strict=True)
    assert {row.name for row in report(parent).gemms} == {"0.0", "1"}


def test_a_part_of_a_compiled_model_is_refused() -> None:
    parent, child = _nested()
    lpcompile(parent, "fp8-rowwise")
    x = torch.randn(4, 8)
    expected = parent(x)
    for part in (child, copy.deepcopy(child), child[0]):  # type: ignore[index]
        with pytest.raises(LpError, match=r"a part of a compiled model.* Try restore\(the model that was compiled\)"):
            lpcompile(part, "int8")
    assert torch.equal(parent(x), expected)
    restore(parent)
    assert report(lpcompile(child, "int8", strict=True)).policy == "int8"


def test_copies_and_wrapped_models_are_compiled_anew() -> None:
    parent, _ = _nested()
    lpcompile(parent, "hfp8")
    twin = copy.deepcopy(parent)
    assert report(lpcompile(twin, "int8", strict=True)).policy == "int8"
    assert report(parent).policy == "hfp8"
    wrapper = nn.Module()
    wrapper.module = parent
    lpcompile(wrapper, "fp8-rowwise", strict=True)
    assert {row.name for row in report(wrapper).gemms} == {"module.0.0", "module.1"}
