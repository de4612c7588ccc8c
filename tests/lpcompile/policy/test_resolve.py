"""Policies as values: which rule decides which role of which site, phases, hash and text."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lpcompile.errors import NotSupported, PolicyError
from lpcompile.policy.file import load_policy
from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Match, Site
from runtime.numerics.specs import GemmSpec, LayerSpec, QuantSpec, ScaleSpec

FIRST = Site("stem.conv", "conv2d", 0, 4, 64, 27)
MIDDLE = Site("blocks.0.attn.q", "linear", 1, 4, 64, 64)
WIDE = Site("blocks.0.mlp.up", "linear", 2, 4, 256, 64)
LAST = Site("head", "linear", 3, 4, 10, 64)
PRODUCT = Site("blocks.0.attn.matmul", "matmul", None, 4, None, None)
SITES = [FIRST, MIDDLE, WIDE, LAST, PRODUCT]


def policy(*rules: dict[str, Any], **rest: Any) -> Policy:
    return Policy.model_validate({"rules": list(rules), **rest})


def names(match: dict[str, Any]) -> list[str]:
    condition = Match.model_validate(match)
    return [site.name for site in SITES if condition.matches(site)]


# Matching


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({}, SITES),
        ({"name": "*"}, SITES),
        ({"name": "blocks.*"}, [MIDDLE, WIDE, PRODUCT]),
        ({"name": "blocks"}, []),
        ({"name": "HEAD"}, []),
        ({"op": "linear"}, [MIDDLE, WIDE, LAST]),
        ({"op": ["conv2d", "matmul"]}, [FIRST, PRODUCT]),
        ({"position": "first"}, [FIRST]),
        ({"position": ["first", "last"]}, [FIRST, LAST]),
        ({"position": "last", "op": "conv2d"}, []),
        ({"shape": {"k": ">=64"}}, [MIDDLE, WIDE, LAST]),
        ({"shape": {"k": ">= 64", "n": "<256"}}, [MIDDLE, LAST]),
        ({"shape": {"n": 64}}, [FIRST, MIDDLE]),
        ({"shape": {"n": "!=64"}}, [WIDE, LAST]),
        ({"shape": {"n": "<=10"}}, [LAST]),
        ({"shape": {"n": ">64"}}, [WIDE]),
        ({"shape": {"n": ">=64,<=128"}}, [FIRST, MIDDLE]),
        ({"shape": {"n": [">=64", "<256"]}}, [FIRST, MIDDLE]),
        ({"shape": {"n": "%16"}}, [FIRST, MIDDLE, WIDE]),
        ({"shape": {"n": "!%16"}}, [LAST]),
        ({"shape": {"k": "%16", "n": "%128"}}, [WIDE]),
        ({"name": ["head", "stem.*"]}, [FIRST, LAST]),
        ({"not": "head"}, [FIRST, MIDDLE, WIDE, PRODUCT]),
        ({"name": "blocks.*", "not": ["*.up", "re:.*matmul.*"]}, [MIDDLE]),
        ({"name": "re:blocks\\.[0-9]+\\.(attn|mlp)\\..*"}, [MIDDLE, WIDE, PRODUCT]),
        ({"name": "re:mlp"}, []),
        ({"name": "[!b]*"}, [FIRST, LAST]),
    ],
)
def test_a_match_is_all_of_its_conditions(match: dict[str, Any], expected: list[Site]) -> None:
    assert names(match) == [site.name for site in expected]


def test_the_only_leaf_is_first_and_last() -> None:
    only = Site("fc", "linear", 0, 1, 2, 2)
    assert Match(position=("first",)).matches(only)
    assert Match(position=("last",)).matches(only)


def test_functional_gemms_are_not_counted() -> None:
    assert not Match(position=("first", "last")).matches(PRODUCT)


def test_an_unknown_size_fulfils_no_bound() -> None:
    assert PRODUCT.name not in names({"shape": {"k": ">=0"}})


# Resolution


def test_per_role_the_first_rule_that_sets_it_decides() -> None:
    resolved = policy(
        {"match": {"name": "head"}, "fwd": {"x": "bf16"}},
        {"match": {"op": "linear"}, "fwd": {"x": "e4m3", "w": "e4m3"}, "bwd": {"dy": "e5m2", "w": "e4m3"}},
        {"bwd": {"dy": "fp16"}},
    ).resolve(SITES)
    head = resolved.specs["head"]
    assert head == LayerSpec(
        fwd=GemmSpec(lhs=QuantSpec("bf16")), bwd=GemmSpec(QuantSpec("e5m2"), QuantSpec("e4m3")), grad=GemmSpec()
    )
    assert resolved.rule_of["head"] == {"fwd": "rules[0]", "bwd": "rules[1]"}
    assert resolved.rule_of[MIDDLE.name] == {"fwd": "rules[1]", "bwd": "rules[1]"}
    assert resolved.rule_of[FIRST.name] == {"bwd": "rules[2]"}


def test_a_role_that_no_rule_sets_is_fp32_and_a_site_without_any_is_left_alone() -> None:
    resolved = policy({"match": {"op": "linear"}, "fwd": {"x": "bf16", "w": "bf16"}}).resolve(SITES)
    spec = resolved.specs[LAST.name]
    assert spec is not None
    assert spec.bwd.is_identity
    assert spec.grad.is_identity
    assert resolved.specs[PRODUCT.name] is None
    assert resolved.rule_of[PRODUCT.name] == {}


def test_an_empty_role_table_is_fp32_said_aloud() -> None:
    resolved = policy({"match": {"name": "head"}, "fwd": {}}, {"fwd": {"x": "e4m3"}}).resolve(SITES)
    assert resolved.specs["head"] == LayerSpec()


def _idle(resolved: Resolution) -> list[str]:
    return [use.label for use in resolved.rules if use.is_idle]


def test_a_rule_that_matches_nothing_is_idle() -> None:
    rule = {"match": {"name": "*.lm_head", "op": ["linear", "matmul"], "shape": {"k": ">=64", "n": 8}}, "fwd": {}}
    resolved = policy({"fwd": {}}, rule).resolve(SITES)
    (idle,) = (use for use in resolved.rules if use.is_idle)
    assert (idle.label, idle.condition) == ("rules[1]", "name *.lm_head, op linear|matmul, n ==8, k >=64")
    assert not idle.sites


def test_a_rule_that_matches_and_decides_nothing_is_dead() -> None:
    resolved = policy({"fwd": {}}, {"fwd": {"x": "e4m3"}}).resolve(SITES)
    assert _idle(resolved) == ["rules[1]"]
    assert [(use.num_rows, len(use.sites), use.deciders) for use in resolved.rules] == [
        (5, 5, ()),
        (0, 5, ("rules[0]",)),
    ]


def test_a_rule_that_decides_one_row_is_not_dead() -> None:
    rules = {"match": {"op": "linear"}, "fwd": {}, "bwd": {}, "grad": {}}, {"match": {"name": "head"}, "fwd": {}}
    assert _idle(policy(*rules).resolve(SITES)) == ["rules[1]"]
    assert _idle(policy(*reversed(rules)).resolve(SITES)) == []


def test_what_a_rule_leaves_runs_as_it_was() -> None:
    resolved = policy(
        {"match": {"name": "head"}, "fwd": {"x": "bf16"}},
        {"match": {"name": ["head", "*.up"]}, "leave": True},
        {"match": {"op": "linear"}, "fwd": {"x": "e4m3"}, "bwd": {}, "grad": {}},
    ).resolve(SITES)
    assert resolved.specs[WIDE.name] is None
    assert resolved.rule_of[WIDE.name] == dict.fromkeys(("fwd", "bwd", "grad"), "rules[1]")
    assert resolved.specs["head"] == LayerSpec(fwd=GemmSpec(lhs=QuantSpec("bf16")))
    assert resolved.rule_of["head"] == {"fwd": "rules[0]", "bwd": "rules[1]", "grad": "rules[1]"}
    assert [use.num_rows for use in resolved.rules] == [1, 5, 3]
    with pytest.raises(PolicyError, match="the rule leaves alone what it sets"):
        policy({"leave": True, "fwd": {}})


def test_what_another_file_overrides_is_not_dead(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("rules: [{match: {op: linear}, fwd: {x: e4m3}}]\n")
    own = tmp_path / "own.yaml"
    own.write_text("extends: base.yaml\nrules: [{fwd: {x: e5m2}}]\n")
    assert _idle(load_policy(own).resolve(SITES)) == []
    own.write_text("rules: [{fwd: {x: e5m2}}, {match: {op: linear}, fwd: {x: e4m3}}]\n")
    assert len(_idle(load_policy(own).resolve(SITES))) == 1


def test_a_bare_name_means_the_rounding_of_the_row_and_scale_one() -> None:
    spec = policy({"fwd": {"x": "dlfloat16", "w": "e4m3"}}).resolve([LAST]).specs["head"]
    assert spec is not None
    assert spec.fwd.lhs == QuantSpec("dlfloat16", "nearest_away", None)
    assert spec.fwd.rhs == QuantSpec("e4m3", "nearest_even", None)


def test_scale_rounding_accumulator_and_output_reach_the_spec() -> None:
    x = {
        "format": "int8",
        "rounding": "stochastic",
        "scale": {"granularity": "block", "rule": "pow2", "block": [1, 32]},
    }
    rule = {"fwd": {"x": x, "w": {"format": "int4", "scale": {}}, "accumulate": "int32", "out": "bf16"}}
    spec = policy(rule).resolve([LAST]).specs["head"]
    assert spec is not None
    assert str(spec.fwd) == "int8 stochastic block[1,32]/pow2 * int4 nearest_even tensor/amax -> int32 -> bf16"
    assert spec.fwd.rhs.scale == ScaleSpec("tensor", "amax")


def test_a_and_b_are_the_slots_of_x_and_w() -> None:
    product = {
        "fwd": {"a": "e4m3", "b": "e3m2"},
        "bwd": {"dy": "e5m2", "b": "e3m2"},
        "grad": {"dy": "e5m2", "a": "e4m3"},
    }
    layer = {
        "fwd": {"x": "e4m3", "w": "e3m2"},
        "bwd": {"dy": "e5m2", "w": "e3m2"},
        "grad": {"dy": "e5m2", "x": "e4m3"},
    }
    assert policy(product) == policy(layer)
    printed = yaml.safe_load(policy({"match": {"op": "matmul"}, **layer}).to_yaml())["rules"][0]
    assert list(printed["fwd"]) == ["a", "b", "accumulate", "out"]
    assert list(printed["grad"]) == ["dy", "a", "accumulate", "out"]


# Values made in Python


def test_errors_of_a_policy_made_in_python_say_the_key() -> None:
    with pytest.raises(PolicyError, match=r'^policy: rules\[0\]\.fwd\.x: "e4m4" is not a number format\. Did you mean'):
        policy({"fwd": {"x": "e4m4"}})
    with pytest.raises(
        NotSupported, match=r"^policy: wire\.error_feedback: error_feedback: true is not in this version"
    ):
        policy(wire={"format": "e4m3", "error_feedback": True})


def test_names_of_other_policies_must_be_loaded_first() -> None:
    unloaded = policy(extends=["bf16"], schedule=[{"from_step": 0, "policy": "fp16"}])
    sentence = r'^policy "policy" names bf16, fp16, not loaded yet\. Try load_policy\(policy\)\.$'
    with pytest.raises(PolicyError, match=sentence):
        unloaded.resolve(SITES)
    with pytest.raises(PolicyError, match=sentence):
        _ = unloaded.phases


def test_a_policy_is_frozen_hashable_and_picklable() -> None:
    one = policy({"fwd": {"x": {"format": "e4m3", "scale": {}}}})
    with pytest.raises(ValueError, match="frozen"):
        one.name = "other"  # type: ignore[misc]
    assert len({one, policy({"fwd": {"x": {"format": "e4m3", "scale": {"granularity": "tensor"}}}})}) == 1
    assert pickle.loads(pickle.dumps(one)) == one


def test_the_hash_sees_values_and_not_spellings() -> None:
    short = policy({"fwd": {"x": "e4m3"}})
    long = policy({"match": {"name": "*"}, "fwd": {"x": {"format": "e4m3", "rounding": "nearest_even"}, "w": "fp32"}})
    assert short.hash == long.hash
    assert len(short.hash) == 64
    assert short.hash != policy({"fwd": {"x": "e5m2"}}).hash
    assert short.hash != policy({"fwd": {"x": "e4m3"}}, wire={"format": "e4m3"}).hash


# Phases


def test_no_schedule_is_one_phase() -> None:
    one = policy({"fwd": {"x": "e4m3"}})
    assert one.phases == [(0, one)]


def test_phases_are_sorted_and_carry_only_rules_of_another_policy() -> None:
    warm = {"name": "warm", "rules": [{"fwd": {"x": "bf16"}}]}
    main = policy(
        {"fwd": {"x": "e4m3"}},
        name="main",
        wire={"format": "e4m3"},
        loss_scale={"kind": "static", "init": 8},
        schedule=[{"from_step": 200}, {"from_step": 0, "policy": warm}],
    )
    (start, first), (turn, second) = main.phases
    assert (start, first.name, turn, second.name) == (0, "warm", 200, "main")
    assert first.wire == second.wire == main.wire
    assert first.loss_scale == main.loss_scale
    assert str(first.rules[0].fwd.spec().lhs) == "bf16 nearest_even"  # type: ignore[union-attr]
    assert second.rules == main.rules
    assert first.phases == [(0, first)]


# Text


def test_to_yaml_of_one_policy() -> None:
    one = policy(
        {"match": {"op": "linear", "position": ["first", "last"]}, "fwd": {"x": "bf16"}},
        {"bwd": {"dy": {"format": "e5m2", "scale": {"granularity": "row"}}}},
        name="mine",
        source="here: there",
        loss_scale={"kind": "static", "init": 128},
        wire={"format": "e4m3"},
    )
    assert one.to_yaml() == (
        "version: 1\n"
        "name: mine\n"
        "source: 'here: there'\n"
        "rules:\n"
        "- match: {op: linear, position: [first, last]}\n"
        "  fwd: {x: bf16, w: fp32, accumulate: fp32, out: fp32}\n"
        "- bwd:\n"
        "    dy: {format: e5m2, scale: {granularity: row, rule: amax}}\n"
        "    w: fp32\n"
        "    accumulate: fp32\n"
        "    out: fp32\n"
        "loss_scale: {kind: static, init: 128.0, growth: 2.0, backoff: 0.5, interval: 2000, min: 1.0}\n"
        "wire: {format: e4m3, block: 256, hierarchical: auto, error_feedback: false, min_numel: 1024}\n"
    )


def test_describe_is_for_a_person() -> None:
    one = policy({"match": {"op": "linear"}, "fwd": {"x": "e4m3", "w": "e4m3"}}, name="mine", source="me")
    assert one.describe() == (
        "mine (me)\n"
        f"  hash {one.hash[:16]}\n"
        "  rules[0]: op linear\n"
        "    fwd  x e4m3 nearest_even, w e4m3 nearest_even, accumulate fp32, out fp32\n"
        "  update: master fp32, momentum fp32, variance fp32, nearest_even\n"
        "  loss scale: none\n"
        "  wire: uncompressed"
    )
    assert "no rules: every op is left alone" in Policy().describe()


FORMATS = st.sampled_from(["fp32", "bf16", "e4m3", "dlfloat16", "int8", "1-4-3:bias=11"])
SCALES = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "granularity": st.sampled_from(["tensor", "row", "column"]),
            "rule": st.sampled_from(["amax", "pow2"]),
        },
    ),
    st.fixed_dictionaries(
        {"granularity": st.just("block"), "block": st.tuples(st.integers(1, 9), st.integers(1, 999))}
    ),
)
ROUNDINGS = st.sampled_from(["nearest_even", "nearest_away", "toward_zero", "stochastic"])
OPERANDS = st.one_of(
    FORMATS, st.fixed_dictionaries({"format": FORMATS}, optional={"rounding": ROUNDINGS, "scale": SCALES})
)
OUT = {
    "out": FORMATS,
    "accumulate": st.sampled_from(["fp32", {"format": "fp32"}, "dlfloat16", {"format": "1-6-9", "chunk": 64}]),
}
TABLES = {
    "fwd": st.fixed_dictionaries({}, optional={"x": OPERANDS, "b": OPERANDS, **OUT}),
    "bwd": st.fixed_dictionaries({}, optional={"dy": OPERANDS, "w": OPERANDS, **OUT}),
    "grad": st.fixed_dictionaries({}, optional={"dy": OPERANDS, "a": OPERANDS, **OUT}),
}
WORDS = st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable() and not set(text) & set("/\\"))
GLOBS = st.text("abz0_.*?", min_size=1, max_size=8).filter(lambda text: not text.startswith(".*"))
MATCHES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.one_of(GLOBS, st.lists(GLOBS, min_size=1, max_size=3)),
        "not": GLOBS,
        "class": GLOBS,
        "layers": st.sampled_from(["2-13, -2..", "0", 3, [0, -1], "..4", "first 2"]),
        "op": st.lists(st.sampled_from(["linear", "conv2d", "matmul"]), min_size=1, max_size=2),
        "position": st.sampled_from(["first", ["first", "last"]]),
        "shape": st.fixed_dictionaries(
            {}, optional={"k": st.sampled_from([64, ">= 8", "!=3", ">=64, <=4096", "%16"]), "n": st.just("<9")}
        ),
    },
)
RULES = st.lists(
    st.fixed_dictionaries({"match": MATCHES}, optional=TABLES).filter(lambda rule: len(rule) > 1), max_size=3
)
POLICIES = st.fixed_dictionaries(
    {"name": WORDS, "rules": RULES},
    optional={
        "source": st.text(max_size=20),
        "loss_scale": st.fixed_dictionaries(
            {"kind": st.sampled_from(["none", "static", "dynamic"])},
            optional={"init": st.integers(0, 90).map(lambda power: 2.0**power), "interval": st.integers(1, 10**6)},
        ),
        "wire": st.fixed_dictionaries(
            {"format": st.sampled_from(["e4m3", "e5m2", "int8", "fp32", "hfp8-143"])},
            optional={"block": st.integers(1, 999), "hierarchical": st.sampled_from([False, "auto"])},
        ),
        "schedule": st.tuples(RULES, st.integers(1, 10**6)).map(
            lambda drawn: [{"from_step": drawn[1]}, {"from_step": 0, "policy": {"name": "warm", "rules": drawn[0]}}]
        ),
    },
)


@settings(max_examples=150, deadline=None)
@given(POLICIES)
def test_yaml_reads_back_as_an_equal_policy(values: dict[str, Any]) -> None:
    one = Policy.model_validate(values)
    again = Policy.model_validate(yaml.safe_load(one.to_yaml()))
    assert again == one
    assert again.hash == one.hash
    assert again.to_yaml() == one.to_yaml()
    assert again.resolve(SITES).specs == one.resolve(SITES).specs
