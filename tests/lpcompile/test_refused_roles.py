"""A role that nothing can run as the policy says is refused alone: the others of its site run as said."""

from typing import Any

import pytest
import torch
from torch import nn

from lpcompile import LoweringError, LoweringWarning, Policy, lpcompile, report
from passes.ir.parser import parse_program
from passes.ir.printer import print_program

E4M3 = {"format": "e4m3", "scale": {"granularity": "tensor"}}
ROWS = {"format": "e4m3", "scale": {"granularity": "row"}}
IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "fwd": {"x": {"format": "e4m3", "scale": {"granularity": "column"}}, "w": E4M3},
    "bwd": {"dy": {"format": "e4m3", "scale": {"granularity": "column"}}, "w": E4M3},
    "grad": {"dy": ROWS, "x": ROWS},
}
"""A scale along the sum of that role."""
POSSIBLE: dict[str, dict[str, Any]] = {
    "fwd": {"x": E4M3, "w": E4M3}, "bwd": {"dy": E4M3, "w": E4M3}, "grad": {"dy": E4M3, "x": E4M3},
}  # fmt: skip


def _policy(**roles: Any) -> Policy:
    return Policy.model_validate({"version": 1, "name": "p", "rules": [{"match": {"name": "*"}, **roles}]})


def _run(policy: Policy | None) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(16, 8))
    x, dy = torch.randn(4, 16, requires_grad=True), torch.randn(4, 8)
    if policy is not None:
        lpcompile(model, policy)
    y = model(x)
    return model, [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy)]


@pytest.mark.filterwarnings("ignore::lpcompile.errors.LoweringWarning")
@pytest.mark.parametrize("impossible", ["fwd", "bwd", "grad"])
def test_only_the_impossible_role_is_refused(impossible: str) -> None:
    others = {role: said for role, said in POSSIBLE.items() if role != impossible}
    model, found = _run(_policy(**{**others, impossible: IMPOSSIBLE[impossible]}))
    _, wanted = _run(_policy(**others))
    assert all(map(torch.equal, found, wanted))
    rows = {row.role: row for row in report(model).gemms}
    assert [rows[role].fidelity == "refused" for role in ("fwd", "bwd", "grad")] == [
        role == impossible for role in ("fwd", "bwd", "grad")
    ]
    refused = rows.pop(impossible)  # type: ignore[call-overload]
    assert (refused.backend, refused.counts, refused.runs_as_policy_says) == ("original", "0 of 1 calls", False)
    assert "scale" in refused.reason
    assert all(row.counts == "1 of 1 calls" for row in rows.values())
    assert f"0  {impossible}  1 x  {refused.reason}" in report(model).to_text()


def test_it_is_told_and_strict_refuses_it() -> None:
    policy = _policy(fwd=POSSIBLE["fwd"], grad=IMPOSSIBLE["grad"])
    model = nn.Sequential(nn.Linear(16, 8))
    with pytest.warns(LoweringWarning, match="1 of 3 named GEMMs does not run as it says, first 0 grad"):
        lpcompile(model, policy)
    with pytest.raises(LoweringError, match="0 grad: grad"):
        lpcompile(model, policy, strict=True)


@pytest.mark.filterwarnings("ignore::lpcompile.errors.LoweringWarning")
def test_a_site_that_is_found_as_it_runs_likewise() -> None:
    class Product(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b

    def policy(**roles: Any) -> Policy:
        return _policy(fwd={"a": E4M3, "b": E4M3}, **roles)

    said = policy(bwd={"dy": {"format": "e4m3", "scale": {"granularity": "column"}}, "b": E4M3})
    results = []
    for each in (said, policy()):
        torch.manual_seed(0)
        a, b = torch.randn(4, 8, requires_grad=True), torch.randn(8, 3, requires_grad=True)
        model = lpcompile(Product(), each)
        results.append([model(a, b), *torch.autograd.grad(model(a, b).sum(), [a, b])])
        assert [row.fidelity == "refused" for row in report(model).gemms] == [False, each is said, False]
    assert all(map(torch.equal, *results))
    with pytest.raises(LoweringError, match="matmul_0 bwd"):
        lpcompile(Product(), said, strict=True)(a, b)


@pytest.mark.filterwarnings("ignore::lpcompile.errors.LoweringWarning")
def test_the_exported_graph_and_its_text_have_the_refused_role() -> None:
    from lpcompile.compiled import get_compiled

    torch.manual_seed(0)
    policy, x = _policy(fwd=POSSIBLE["fwd"], bwd=POSSIBLE["bwd"], grad=IMPOSSIBLE["grad"]), torch.randn(4, 16)
    model = lpcompile(nn.Sequential(nn.Linear(16, 8)).eval(), policy, (x,), mode="infer")
    with torch.no_grad():
        y = model(x)
    assert report(model).unserved == ""
    torch.testing.assert_close(y, model(x).detach())
    program = get_compiled(model).phase.program
    assert program.refused_roles("0") == ["grad"]
    assert parse_program(print_program(program)).refused_roles("0") == ["grad"]


@pytest.mark.filterwarnings("ignore::lpcompile.errors.LoweringWarning")
def test_a_site_of_which_nothing_runs_is_refused_whole() -> None:
    model, found = _run(_policy(grad=IMPOSSIBLE["grad"]))
    assert all(map(torch.equal, found, _run(None)[1]))
    assert {row.fidelity for row in report(model).gemms} == {"refused"}
