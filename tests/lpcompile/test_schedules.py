"""What a schedule and evaluation change as a model runs: a role at a step, a module in evaluation mode."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lpcompile import Policy, advance, compile_joint, load_policy, lpcompile, report
from lpcompile.errors import PolicyError
from lpcompile.policy.file import policy_schema

RULE = {
    "fwd": {"x": "e4m3", "w": "e4m3"},
    "bwd": {"dy": "e5m2", "w": "e4m3"},
    "grad": {"dy": "e5m2", "x": "e4m3"},
}
INT8 = {
    "fwd": {
        "x": {"format": "int8", "scale": {"granularity": "tensor"}},
        "w": {"format": "int8", "scale": {"granularity": "tensor"}},
    },
    "bwd": {"dy": "e5m2", "w": "e3m2"},
    "grad": {"dy": "e5m2", "x": "e3m2"},
}


class Net(nn.Module):
    """A leaf, a product that the module writes, multi-head attention, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.up = nn.Linear(16, 16)
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x.mT).mT)
        x = torch.matmul(torch.softmax(torch.matmul(x, x.mT), -1), x)
        y: Tensor = self.mha(x, x, x, need_weights=False)[0]
        return y


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def policy(rule: Any = RULE, **values: Any) -> Policy:
    return load_policy(Policy.model_validate({"name": "own", "rules": [rule], **values}))


def inputs() -> Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


def results(model: nn.Module, run: Any = None) -> list[Tensor]:
    x = inputs()
    model.zero_grad()
    y = (model if run is None else run)(x)
    y.square().sum().backward()
    grads = [each.grad for each in (x, *model.parameters())]
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def mixed(**roles: Any) -> Policy:
    return policy({role: roles.get(role, RULE[role]) for role in RULE})


FRONTENDS = ["eager", "torch.compile", "joint"]


def made(of: Policy, frontend: str = "eager", **options: Any) -> tuple[nn.Module, Any]:
    model = lpcompile(net(), of, **options)
    if frontend == "joint":
        return model, compile_joint(model, backend="aot_eager")
    return model, torch.compile(model, backend="aot_eager") if frontend == "torch.compile" else model


@pytest.mark.parametrize(
    ("role", "frontend"),
    [("fwd", "eager"), ("bwd", "eager"), ("grad", "eager"), ("fwd", "torch.compile"), ("bwd", "joint")],
)
def test_one_role_changes_at_its_step(role: str, frontend: str) -> None:
    torch._dynamo.reset()
    named = {"name": "other", "rules": [INT8]}
    model, run = made(policy(schedule=[{"from_step": 0}, {"from_step": 2, role: named}]), frontend)
    before, after = results(made(policy())[0]), results(made(mixed(**{role: INT8[role]}))[0])
    assert not same(before, after)
    for step, expected in ((0, before), (1, before), (2, after), (3, after), (1, before)):
        advance(model, to_step=step)
        assert same(results(model, run), expected)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_model_in_evaluation_mode_computes_as_evaluation_says(frontend: str) -> None:
    torch._dynamo.reset()
    model, run = made(policy(evaluate={"policy": {"name": "int", "rules": [INT8]}}), frontend)
    trained, evaluated = results(made(policy())[0]), results(made(policy(INT8))[0])
    assert not same(trained[:1], evaluated[:1])
    for is_training in (True, False, True):
        model.train(is_training)
        assert same(results(model, run), trained if is_training else evaluated)


def test_evaluation_holds_in_every_phase_and_schedules_go_on_below_it() -> None:
    schedule = [{"from_step": 0}, {"from_step": 1, "policy": "bf16"}]
    model = lpcompile(net(), policy(schedule=schedule, evaluate="fp32"))
    plain = results(net())
    seen = []
    for step in (0, 1, 0):
        advance(model, to_step=step)
        seen.append(results(model.train()))
        assert same(results(model.eval()), plain)
    assert same(seen[0], seen[2])
    assert not same(seen[0], seen[1])


def test_a_part_that_is_kept_in_evaluation_mode_computes_as_evaluation_says() -> None:
    """As dropout and batch norm of frozen parts."""
    own = policy(evaluate={"policy": {"name": "int", "rules": [INT8]}})
    model = lpcompile(net(), own)
    model.up.eval()
    by_name = policy(rules=[{"match": {"name": "up"}, **INT8}, RULE])
    assert same(results(model), results(lpcompile(net(), by_name)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_runs_in_the_mode_of_its_forward(reentrant: bool) -> None:
    model = lpcompile(net(), policy(evaluate={"policy": {"name": "int", "rules": [INT8]}}))
    for is_training in (True, False):
        model.train(is_training)
        assert same(results(model), results(model, lambda x: checkpoint(model, x, use_reentrant=reentrant)))


def test_a_mode_is_a_graph_and_a_step_is_none() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = lpcompile(net(), policy(evaluate="bf16"))
    run = torch.compile(model, backend=counter)
    seen = []
    for step in range(3):
        for is_training in (True, False):
            model.train(is_training)
            run(inputs())
            seen.append(counter.frame_count)
        advance(model, to_step=step)
    assert seen[1] == 2 * seen[0]
    assert seen[2:] == 4 * seen[1:2]


def test_an_inference_graph_is_that_of_evaluation() -> None:
    own = policy(evaluate={"policy": {"name": "int", "rules": [INT8]}})
    x = inputs().detach()
    model = lpcompile(net().eval(), own, (x,), mode="infer")
    expected = lpcompile(net().eval(), policy(INT8), (x,), mode="infer")
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    assert report(model).unserved == report(expected).unserved == ""
    assert [row.lhs for row in report(model).gemms] == [row.lhs for row in report(expected).gemms]


def test_the_certificate_is_of_the_mode_that_the_model_is_in() -> None:
    model = lpcompile(net(), policy(evaluate="bf16"))
    assert (report(model).policy, report(model.eval()).policy, report(model.train()).policy) == ("own", "bf16", "own")
    model.eval()(inputs())
    assert {row.lhs for row in report(model).gemms} == {"bf16 nearest_even"}
    assert all(row.runs_as_policy_says for row in report(model).gemms)


def test_a_copy_has_its_own_mode() -> None:
    model = lpcompile(net(), policy(evaluate="fp32"))
    copied = copy.deepcopy(model).eval()
    assert same(results(copied), results(net()))
    assert same(results(model), results(made(policy())[0]))


def test_a_share_of_a_run_needs_its_length() -> None:
    own = policy(schedule=[{"from_step": 0}, {"from_step": "50%", "fwd": "bf16"}])
    with pytest.raises(PolicyError, match="a share of a run, and how many steps that has is not known"):
        lpcompile(net(), own)
    model = lpcompile(net(), own.over(4))
    assert [report(model).policy for step in range(4) if advance(model, to_step=step) is None] == [
        "own", "own", "own, fwd of bf16", "own, fwd of bf16",
    ]  # fmt: skip


def test_a_scale_is_not_learned_in_two_ways_in_training_and_evaluation() -> None:
    def learned(kind: str) -> Any:
        return {"fwd": {"x": {"format": "int8", "quantizer": {"kind": kind, "init": 1}}, "w": "int8"}}

    own = policy(learned("pact"), evaluate={"policy": {"name": "other", "rules": [learned("lsq")]}})
    with pytest.raises(Exception, match="two phases of the schedule have one scale in two ways"):
        lpcompile(net(), own)


def test_the_schema_knows_it(tmp_path: Path) -> None:
    properties = policy_schema()["$defs"]["Phase"]["properties"]
    assert set(properties) == {"from_step", "policy", "fwd", "bwd", "grad"}
    assert "evaluate" in policy_schema()["properties"]
