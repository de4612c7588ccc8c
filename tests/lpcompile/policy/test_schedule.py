"""Schedules as a policy file says them: by step and by share of the run, for all roles or one; evaluation."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lpcompile import Policy, load_policy
from lpcompile.errors import PolicyError
from lpcompile.policy.rules import Site
from runtime.numerics.specs import ROLES, LayerSpec

LAYER = Site("0", "linear", 0, 1, 8, 8)
RULE = {"fwd": {"x": "e4m3", "w": "e4m3"}, "bwd": {"dy": "e5m2", "w": "e4m3"}, "grad": {"dy": "e5m2", "x": "e4m3"}}


def policy(**values: Any) -> Policy:
    return load_policy(Policy.model_validate({"name": "own", "rules": [RULE], **values}))


def specs(of: Policy) -> LayerSpec:
    found = of.resolve([LAYER]).specs["0"]
    assert found is not None
    return found


def test_a_phase_changes_the_roles_that_it_names() -> None:
    own = policy(schedule=[{"from_step": 0}, {"from_step": 5, "fwd": "bf16"}])
    (_, first), (step, last) = own.phases
    assert step == 5
    assert last.name == "own, fwd of bf16"
    assert specs(first) == specs(own)
    bf16 = specs(load_policy("bf16"))
    assert specs(last) == LayerSpec(fwd=bf16.fwd, bwd=specs(own).bwd, grad=specs(own).grad)


def test_roles_of_three_policies() -> None:
    schedule = [{"from_step": 0, "policy": "int8", "dgrad": "hfp8", "grad": "fp16"}]
    (_, mixed), *_ = policy(schedule=schedule).phases
    int8, hfp8, fp16 = (specs(load_policy(name)) for name in ("int8", "hfp8", "fp16"))
    assert specs(mixed) == LayerSpec(fwd=int8.fwd, bwd=hfp8.bwd, grad=fp16.grad)
    assert mixed.name == "int8, bwd of hfp8, grad of fp16"


def test_what_a_role_policy_leaves_is_left_in_that_role_alone() -> None:
    left = {"name": "left", "rules": [{"match": {"op": "linear"}, "leave": True}, RULE]}
    (_, found), *_ = policy(schedule=[{"from_step": 0, "bwd": left}]).phases
    assert specs(found) == LayerSpec(fwd=specs(policy()).fwd, grad=specs(policy()).grad)
    (_, none), *_ = policy(
        schedule=[{"from_step": 0, **{role: {"name": "fp32", "rules": []} for role in ROLES}}]
    ).phases
    assert none.resolve([LAYER]).specs["0"] is None


@pytest.mark.parametrize(
    ("share", "steps", "first"), [("80%", 10, 8), ("80%", 11, 9), ("0%", 7, 0), ("33.3 %", 1000, 333), ("99%", 3, 3)]
)
def test_a_share_of_the_run_is_a_step_once_its_length_is_known(share: str, steps: int, first: int) -> None:
    start = [] if share == "0%" else [{"from_step": 0}]
    own = policy(schedule=[*start, {"from_step": share, "policy": "bf16"}])
    *_, (step, found) = own.over(steps).phases
    assert (step, found.name) == (first, "bf16")
    assert own.over(steps).over(2 * steps) == own.over(steps)


def test_a_share_of_a_run_of_unknown_length_is_told() -> None:
    with pytest.raises(PolicyError) as caught:
        policy(schedule=[{"from_step": 0}, {"from_step": "80%", "policy": "bf16"}]).phases  # noqa: B018
    assert str(caught.value) == (
        'policy "own", from_step: 80%: a share of a run, and how many steps that has is not known. '
        "Try lpcompile(model, load_policy(policy).over(steps))."
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[{from_step: 100%}]",
            "schedule[0].from_step: not a step. Expected 0, 200, or a share of the run from 0% on, ",
        ),
        ("[{from_step: 1e9%}]", "schedule[0].from_step: not a step."),
        ("[{from_step: -1}]", "schedule[0].from_step: not a step."),
        ("[{from_step: true}]", "schedule[0].from_step: not a step."),
        ("[{from_step: 1.5}]", "schedule[0].from_step: not a step."),
        (
            "[{from_step: 80%}]",
            "schedule: no rules hold at step 0. Expected an entry with from_step: 0. Got from_step: 80",
        ),
        ("[{from_step: 0}, {from_step: 8%}, {from_step: 8.0%}]", "schedule: two entries start at step 8%."),
        ("[{from_step: 0}, {from_step: 0%}]", "schedule: two entries start at step 0."),
        ("[{from_step: 0, fwd: nothing}]", 'schedule[0].fwd: "nothing" is neither a shipped policy nor a file.'),
        ("[{from_step: 0, forward: bf16}]", ""),
        ("[{from_step: 0, evaluate: bf16}]", 'schedule[0].evaluate: "evaluate" is not a key here.'),
    ],
)
def test_what_is_no_schedule_is_told(tmp_path: Any, text: str, sentence: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"schedule: {text}\n")
    if not sentence:
        assert load_policy(file).schedule[0].fwd is not None
        return
    with pytest.raises(PolicyError) as caught:
        load_policy(file)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("written", ["bf16", "{policy: bf16}", "{policy: {name: bf16}}"])
def test_evaluation_has_the_rules_it_names(tmp_path: Any, written: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"extends: hfp8\nevaluate: {written}\n")
    own = load_policy(file)
    found = own.evaluation
    assert found is not None
    assert (found.name, found.rules, found.wire) == ("bf16", load_policy("bf16").rules, own.wire)
    assert found.evaluate is None
    again = Policy.model_validate(yaml.safe_load(own.to_yaml()))
    assert (again, again.hash) == (own, own.hash)
    assert own.hash != load_policy("hfp8").hash
    assert "in evaluation mode: bf16" in own.describe()


def test_evaluation_without_rules_of_its_own_is_that_of_the_step() -> None:
    assert policy().evaluation is None


@pytest.mark.parametrize(
    ("leave", "kept"),
    [(True, True), (["fwd", "bwd", "grad"], True), ("dgrad", ["bwd"]), (["grad", "fwd"], ["fwd", "grad"])],
)
def test_a_rule_leaves_roles(leave: Any, kept: Any) -> None:
    own = policy(rules=[{"leave": leave}, RULE])
    assert own.rules[0].plain()["leave"] == kept
    left = ROLES if kept is True else tuple(kept)
    if left == ROLES:
        assert own.resolve([LAYER]).specs["0"] is None
    else:
        assert specs(own) == LayerSpec(**{role: specs(policy()).role(role) for role in ROLES if role not in left})
    assert Policy.model_validate(yaml.safe_load(own.to_yaml())) == own


@pytest.mark.parametrize(
    ("leave", "sentence"),
    [
        ("forward", ""),
        ("fd", 'rules[0].leave: "fd" is not a role. Did you mean "fwd"?'),
        (3, "rules[0].leave: not what a rule leaves. Expected true, or a list of fwd, bwd, grad. Got 3."),
    ],
)
def test_what_a_rule_cannot_leave_is_told(leave: Any, sentence: str) -> None:
    if not sentence:
        assert policy(rules=[{"leave": leave}]).rules[0].leave == ("fwd",)
        return
    with pytest.raises(PolicyError) as caught:
        policy(rules=[{"leave": leave}])
    assert sentence in str(caught.value)


NAMES = st.sampled_from(["bf16", "fp16", "hfp8", "int8", "fp8-rowwise", "fp32"])
STARTS = st.one_of(st.integers(1, 50), st.integers(1, 99).map(lambda share: f"{share}%"))


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("policy", *ROLES), NAMES)), STARTS, st.integers(1, 200))
def test_every_role_is_that_of_the_policy_named_for_it(named: dict[str, str], start: int | str, steps: int) -> None:
    own = policy(schedule=[{"from_step": start, **named}, {"from_step": 0}])
    assert Policy.model_validate(yaml.safe_load(own.to_yaml())) == own
    (_, first), (step, last) = own.over(steps).phases
    if isinstance(start, str):
        share = int(start[:-1])
        assert step * 100 >= share * steps > (step - 1) * 100
    found, base = last.resolve([LAYER]).specs["0"], named.get("policy", "own")
    for role in ROLES:
        source = named.get(role, base)
        said = own.resolve([LAYER]) if source == "own" else load_policy(source).resolve([LAYER])
        wanted = said.specs["0"] or LayerSpec()
        assert (found or LayerSpec()).role(role) == wanted.role(role)
    assert first.resolve([LAYER]).specs == own.resolve([LAYER]).specs
