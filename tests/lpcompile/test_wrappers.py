"""A compiled model is found in whatever wraps it after compiling."""

import pytest
import torch
from torch import nn

from lpcompile import LpError, advance, lpcompile, report
from lpcompile.api import restore, run_state
from lpcompile.frontends.install import installed


class Tuner(nn.Module):
    """As PEFT's LoraModel: the wrapped model is `.model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Wrapper(nn.Module):
    """As PeftModel: two levels above the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Tuner(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_model.model(x)
        return y


def _model() -> nn.Module:
    return lpcompile(nn.Sequential(nn.Linear(8, 8)), "int8")


def test_a_model_is_found_two_levels_below() -> None:
    wrapped = Wrapper(_model())
    wrapped(torch.randn(2, 8))
    assert [(row.name, row.counts) for row in report(wrapped).gemms if row.role == "fwd"] == [("0", "1 of 1 calls")]
    advance(wrapped)
    state = run_state(wrapped)
    assert state is not None
    assert state.step == 1
    restore(wrapped)
    assert installed(wrapped.base_model.model[0]) is None
    with pytest.raises(LpError, match="not compiled"):
        report(wrapped)


def test_two_models_compiled_apart_are_told_apart() -> None:
    both = nn.ModuleDict({"generator": _model(), "critic": _model()})
    with pytest.raises(LpError, match=r"2 models that were compiled apart.*generator, critic.*Try one of them"):
        report(both)
    assert len(report(both["critic"]).gemms) == 3


def test_what_holds_a_compiled_model_is_not_compiled_again() -> None:
    with pytest.raises(LpError, match=r"base_model.model.*compiled already, by itself"):
        lpcompile(Wrapper(_model()), "int8")


def test_a_lora_of_peft_is_told_apart_from_what_it_wraps() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(_model(), peft.LoraConfig(target_modules=["0"], r=2))
    wrapped(torch.randn(2, 8))
    rows = {row.name: row for row in report(wrapped).gemms if row.role == "fwd"}
    assert rows["0"].counts == "1 of 1 calls"
    assert all("came after compiling" in row.reason for name, row in rows.items() if "lora" in name)
