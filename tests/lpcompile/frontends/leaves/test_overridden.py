"""Layers of which something is not as torch wrote it: the part of it that counts is run, or the layer is named as not
reached.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile import compile_joint, lpcompile, report
from lpcompile.api import restore
from lpcompile.errors import LpError
from lpcompile.policy.resolve import Policy

_X = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))


def _linear_policy() -> Policy:
    casts = {"x": "e4m3", "w": "e4m3"}, {"dy": "e5m2", "w": "e4m3"}, {"dy": "e5m2", "x": "e4m3"}
    rule = {"match": {"op": "linear"}, **dict(zip(("fwd", "bwd", "grad"), casts))}
    return Policy.model_validate({"version": 1, "name": "lin", "rules": [rule]})


class _Permuting(nn.LSTM):
    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return tuple(h * 2 for h in hx)


class _Sized(nn.GRU):
    def get_expected_hidden_size(self, input: Tensor, batch_sizes: Any) -> tuple[int, int, int]:
        return 1, 3, 8


class _Checking(nn.LSTM):
    def check_input(self, input: Tensor, batch_sizes: Any) -> None:
        self.num_checks = getattr(self, "num_checks", 0) + 1


class _Doubling(nn.RNN):
    @property
    def _flat_weights(self) -> list[Tensor]:
        return [self._parameters[name] * 2 for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        pass


def _permuting_instance() -> nn.LSTM:
    module = nn.LSTM(8, 8)
    module.permute_hidden = lambda hx, permutation: tuple(h * 2 for h in hx)  # type: ignore[method-assign]
    return module


def _dropped() -> nn.LSTM:
    module = nn.LSTM(8, 8)
    raw = module._parameters.pop("weight_hh_l0")
    module.weight_hh_l0 = raw * 3  # type: ignore[assignment, operator]
    return module


OVERRIDDEN = {
    "permute_hidden": lambda: _Permuting(8, 8),
    "permute_hidden of the instance": _permuting_instance,
    "check_input": lambda: _Checking(8, 8),
    "get_expected_hidden_size": lambda: _Sized(8, 8),
    "_flat_weights": lambda: _Doubling(8, 8),
    "a weight that is computed": _dropped,
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_a_recurrent_layer_of_which_a_part_is_overridden_is_named_as_not_reached(name: str) -> None:
    torch.manual_seed(0)
    module = OVERRIDDEN[name]()
    state = torch.randn(1, 3, 8)
    hx = (state, state) if isinstance(module, nn.LSTM) else state
    expected = module(_X, hx)[0]
    model = nn.ModuleList([module])
    lpcompile(model, _linear_policy())
    assert torch.equal(model[0](_X, hx)[0], expected)
    assert "is not as torch wrote it, or computes a weight" in report(model).unreached["0"]
    assert not report(model).gemms


def test_laying_weights_out_another_way_changes_no_leaf() -> None:
    module = nn.LSTM(8, 8)
    module.flatten_parameters = lambda: None  # type: ignore[method-assign]
    lpcompile(module, _linear_policy(), strict=True)
    assert {row.name for row in report(module).gemms} == {"ih_l0", "hh_l0"}
    copied = copy.deepcopy(module)
    assert torch.equal(copied(_X)[0], module(_X)[0])


def _with_a_forward_of_its_own() -> nn.Sequential:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: F.linear(x, layer.weight * 2, layer.bias)  # type: ignore[method-assign]
    return nn.Sequential(nn.Linear(8, 8), layer)


def _hooked() -> nn.Sequential:
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for module in [*model.modules()]:
        hooks.add_hook_to_module(module, hooks.ModelHook())
    return model


@pytest.mark.parametrize(
    ("make", "factor", "names"),
    [(_with_a_forward_of_its_own, 2, {"0", "1.linear_0"}), (_hooked, 1, {"0.linear_0", "1.linear_0"})],
)
@pytest.mark.parametrize("has_examples", [True, False])
def test_a_forward_of_an_instance_runs_and_its_product_is_named(
    make: Any, factor: int, names: set[str], has_examples: bool
) -> None:
    torch.manual_seed(0)
    model, x = make(), _X[0]
    plain = model(x)
    forwards = [vars(module).get("forward") for module in model.modules()]
    stated = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    stated.load_state_dict(model.state_dict())
    with torch.no_grad():
        stated[1].weight.mul_(factor)
    expected = lpcompile(stated, _linear_policy(), (x,))(x)
    for _ in range(2):  # also of one that is compiled already
        lpcompile(model, _linear_policy(), (x,) if has_examples else None, strict=has_examples)
        assert torch.equal(model(x), expected)
        assert {row.name for row in report(model).gemms} == names
    if make is _hooked:
        assert torch.equal(copy.deepcopy(model)(x), expected)
    restore(model)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert torch.equal(model(x), plain)


def test_a_compilation_that_fails_leaves_the_one_before_it() -> None:
    model = lpcompile(_with_a_forward_of_its_own(), _linear_policy(), (_X[0],))
    expected = model(_X[0])
    with pytest.raises(LpError, match="not a policy"):
        lpcompile(model, 123)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="shapes"):
        lpcompile(model, _linear_policy(), (torch.ones(3, 7),))
    assert torch.equal(model(_X[0]), expected)
    assert {row.name for row in report(model).gemms} == {"0", "1.linear_0"}


def test_a_forward_of_an_instance_is_in_the_joint_graph() -> None:
    model = lpcompile(_with_a_forward_of_its_own(), _linear_policy(), strict=True)
    expected = model(_X[0])
    compile_joint(model, backend="aot_eager")
    assert torch.equal(model(_X[0]), expected)
    assert report(model).num_rewritten == 5
