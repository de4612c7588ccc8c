"""The certificate counts what ran, and looks again: after a child was replaced, appended, wrapped or overridden."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile, report
from lpcompile.errors import LoweringError, LoweringWarning
from lpcompile.reporting.certificate import Report
from lpcompile.reporting.rows import GemmRow


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.down, self.up = base, nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def _compiled() -> Net:
    return lpcompile(Net(), "fp8-rowwise", (torch.randn(4, 8),))


def _rows(found: Report, name: str) -> dict[str, GemmRow]:
    return {row.role: row for row in found.gemms if row.name == name}


def test_calls_are_counted_since_compiling_and_since_the_last_report() -> None:
    model = _compiled()
    assert [row.calls for row in report(model).gemms] == [0] * 6, "the example call is none"
    for _ in range(3):
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    with torch.no_grad():
        model(torch.randn(2, 8))
    first = report(model)
    counted = {role: (row.calls, row.calls_as_said, row.new_calls) for role, row in _rows(first, "a").items()}
    assert counted == {"fwd": (4, 4, 4), "bwd": (3, 3, 3), "grad": (3, 3, 3)}
    assert "calls in eager code since compiling: 20 of 20 ran so; since the last report: 20 of 20" in first.to_text()
    model(torch.randn(4, 8))
    assert _rows(report(model), "b")["fwd"].new_calls == 1
    assert _rows(report(model), "b")["fwd"].new_calls == 0


def test_a_replaced_leaf_is_told() -> None:
    model = _compiled()
    model.b = nn.Linear(8, 8)
    found = report(model)
    assert all("was replaced by a Linear after compiling" in row.reason for row in _rows(found, "b").values())
    assert "3 of 6 named GEMMs run so" in found.to_text()
    assert all(row.runs_as_policy_says for row in _rows(found, "a").values())


def test_a_deleted_leaf_is_told() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "fp8-rowwise")
    del model[1]
    assert "was taken out of the model" in _rows(report(model), "1")["fwd"].reason


def test_an_appended_leaf_is_told() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(8, 8)), "fp8-rowwise")
    model.append(nn.Linear(8, 8))
    rows = _rows(report(model), "1")
    assert set(rows) == {"fwd", "bwd", "grad"}
    assert all("came after compiling" in row.reason and not row.runs_as_policy_says for row in rows.values())


def test_under_a_lora_the_leaf_runs_and_the_new_ones_are_told() -> None:
    model = _compiled()
    model.b = LoRA(model.b)
    model(torch.randn(4, 8))
    found = report(model)
    assert _rows(found, "b")["fwd"].calls_as_said == 1
    assert all(row.runs_as_policy_says for row in _rows(found, "b").values())
    assert not any(row.runs_as_policy_says for name in ("b.down", "b.up") for row in _rows(found, name).values())


def test_an_overridden_forward_is_told() -> None:
    model = _compiled()
    model.b.forward = lambda x: x
    assert all("was overridden after compiling" in row.reason for row in _rows(report(model), "b").values())


def test_the_identity_of_fp32_and_what_is_left_alone_stay_so() -> None:
    model = lpcompile(Net(), "fp32")
    model.b = nn.Linear(8, 8)
    assert report(model).gemms == []


class Mixed(nn.Module):
    """A product whose operands are real numbers in some calls only."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)


def test_a_call_that_falls_through_is_told_once_counted_and_refused_under_strict() -> None:
    policy = "bf16"
    x, numbers = torch.randn(4, 4), torch.arange(16).view(4, 4)
    model = lpcompile(Mixed(), policy, (x, x))
    model(x, x)
    with pytest.warns(LoweringWarning, match="matmul_0 ran as in the uncompiled model"):
        model(numbers, numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(numbers, numbers)
    found = report(model)
    row = _rows(found, "matmul_0")["fwd"]
    assert (row.calls, row.calls_as_said) == (3, 1)
    assert not row.runs_as_policy_says
    assert "2 of 3 calls ran otherwise" in row.reason
    assert "does not run as the policy says" in found.to_text()

    strict = lpcompile(Mixed(), policy, (x, x), strict=True)
    strict(x, x)
    with pytest.raises(LoweringError, match="strict"):
        strict(numbers, numbers)


class _Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w)


def _replace(model: nn.Sequential) -> None:
    model[2] = nn.Linear(8, 8)


def _append(model: nn.Sequential) -> None:
    model.append(nn.Linear(8, 8))


def _write(model: nn.Sequential) -> None:
    model[1] = _Written()


def _override(model: nn.Sequential) -> None:
    model[0].forward = lambda x: x  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("change", [_replace, _append, _write, _override])
@pytest.mark.parametrize("examples", [None, (torch.ones(4, 8),)])
def test_strict_refuses_the_first_call_after_a_change(change, examples) -> None:  # type: ignore[no-untyped-def]
    model = lpcompile(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "int8", examples, strict=True)
    copied = copy.deepcopy(model)
    model(torch.ones(4, 8))
    change(model)
    for _ in range(2):
        with pytest.raises(LoweringError, match=r"would run as in the uncompiled model: .* again"):
            model(torch.ones(4, 8))
    lpcompile(model, "int8", examples)
    model(torch.ones(4, 8))
    copied(torch.ones(4, 8))
    pickle.loads(pickle.dumps(copied))(torch.ones(4, 8))


def test_strict_takes_a_change_that_leaves_every_product_as_it_was() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "int8", strict=True)
    model(torch.ones(4, 8))
    model[1] = nn.GELU()
    model(torch.ones(4, 8))


def test_a_module_that_multiplies_and_came_later_is_told() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "int8", (torch.ones(4, 8),))
    model[1] = _Written()
    assert report(model).unreached == {"1": "the _Written came after compiling. Try lpcompile(model, policy) again"}


@pytest.mark.parametrize("examples", [(torch.ones(4, 8),), None])
def test_a_root_whose_forward_was_overridden_and_passes_its_layers_by_is_told(
    examples: tuple[Tensor, ...] | None,
) -> None:
    model = lpcompile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "int8", examples)
    model.forward = lambda x: model[1](nn.functional.linear(x, model[0].weight))  # type: ignore[method-assign]
    before = report(model)
    assert set(before.uncalled) == {"0", "1"}
    assert "the forward of the root was overridden after compiling" in before.to_text()
    model(torch.ones(4, 8)).sum().backward()
    after = report(model)
    assert set(after.uncalled) == {"0"}
    assert [row.calls for row in after.gemms if row.name == "1"] == [1, 1, 1]


def test_a_forward_of_the_root_that_was_there_or_wraps_what_was_is_not_told() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    assert not report(lpcompile(model, "int8")).uncalled
    model = lpcompile(nn.Sequential(nn.Linear(8, 8)), "int8")
    own = model.forward
    model.forward = functools.wraps(own)(lambda x: own(x).float())  # type: ignore[method-assign]
    assert not report(model).uncalled
