"""Conditions of rules: layers by number, patterns that mean something else, classes, owners, what is called."""

from typing import Any

import pytest
import torch
from torch import nn

from lpcompile.errors import PolicyError
from lpcompile.policy.describe import describe
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Match, Site


def layer(number: int, stem: str = "model.layers") -> Site:
    return Site(f"{stem}.{number}.mlp.up_proj", "linear", number, 16, 64, 64)


LAYERS = [layer(number) for number in range(16)]


def numbers(layers: Any) -> list[int]:
    rule = {"match": {"layers": layers}, "fwd": {"x": "e4m3"}}
    specs = Policy.model_validate({"rules": [rule]}).resolve(LAYERS).specs
    return [number for number, spec in enumerate(specs.values()) if spec is not None]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("2-13", [*range(2, 14)]),
        ("2-13, -2..", [*range(2, 16)]),
        ("-2..", [14, 15]),
        ("..2", [0, 1, 2]),
        ("10..", [*range(10, 16)]),
        ("0, 3,5", [0, 3, 5]),
        ("-1", [15]),
        (-1, [15]),
        (3, [3]),
        ([0, "-2.."], [0, 14, 15]),
        ("2..-3", [*range(2, 14)]),
        ("first 2, last 2", [0, 1, 14, 15]),
        ("20-30", []),
    ],
)
def test_layers_by_number(layers: Any, expected: list[int]) -> None:
    assert numbers(layers) == expected
    printed = Match.model_validate({"layers": layers}).layers
    assert numbers(printed) == expected


def test_each_stack_counts_its_own_layers() -> None:
    sites = [layer(0, "encoder.block"), layer(1, "encoder.block"), *(layer(n, "decoder.block") for n in range(3))]
    rule = {"match": {"layers": "-1"}, "leave": True}
    resolved = Policy.model_validate({"rules": [rule]}).resolve(sites)
    assert resolved.rules[0].sites == ("encoder.block.1.mlp.up_proj", "decoder.block.2.mlp.up_proj")


def test_the_number_of_a_layer_is_the_first_in_the_path() -> None:
    site = Site("model.layers.1.mlp.experts.7.up", "linear", 0, 1, 8, 8)
    assert Match(layers="1").matches(site)  # type: ignore[call-arg]
    assert not Match(layers="7").matches(site)  # type: ignore[call-arg]
    assert not Match(layers="0..").matches(Site("lm_head", "linear", 0, 1, 8, 8))  # type: ignore[call-arg]


@pytest.mark.parametrize("layers", ["x", "", "5-2", "1--2", True, 1.5, [], "2-", "1e9", "9" * 5000, {"from": 2}])
def test_what_says_no_layers_is_refused(layers: Any) -> None:
    with pytest.raises(PolicyError, match=r"layers") as caught:
        Policy.model_validate({"rules": [{"match": {"layers": layers}, "fwd": {}}]})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("glob", "says"),
    [
        ("model.layers.[2-13].mlp.*", 'layers: "2-13"'),
        ("model.layers.[10-15].mlp.*", 'layers: "10-15"'),
        ("model.layers.[^03].*", "[!03]"),
        ("[9-1]*", "is empty"),
        ("a,b", "a list of names"),
        ("q_proj|k_proj", "a list of names"),
        ("*.{q,k}_proj", "a list of names"),
        ("!lm_head", "the key not"),
        (r".*\.mlp", "re: before it"),
        ("^model", "re: before it"),
        ("lm_head$", "re: before it"),
        ("model.(q|k)", "a list of names"),
        ("layers.[0-9]+", "re: before it"),
        ("model.[qk", "a ] for the ["),
        ("\u201c*.mlp\u201d", "straight ones"),
        ("lm\u00a0head", "no-break space"),
        ("re:(a+)+b", "repeats a repetition"),
        ("re:(", "is not a regular expression"),
        ("re:((a|b)*c)*", "repeats a repetition"),
        ("re:" + ".*" * 9, "more than 8 repetitions"),
        ("x" * 501, "a pattern of 501 characters"),
    ],
)
@pytest.mark.parametrize("key", ["name", "not", "class"])
def test_a_glob_that_means_something_else_says_the_key(glob: str, says: str, key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.model_validate({"rules": [{"match": {key: glob}, "fwd": {}}]})
    assert says in str(caught.value)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 32))


class Wide(nn.Linear):
    pass


MODEL = nn.ModuleDict({"gate": Router(), "up": Wide(32, 64), "down": nn.Linear(64, 32)})
FOUND = describe(
    [
        Site("gate.linear_0", "linear", None, 2, 4, 32),
        Site("up", "linear", 0, 2, 64, 32),
        Site("down", "linear", 1, 2, 32, 64),
        Site("sdpa_0.qk", "matmul", None, 2, None, None),
    ],
    MODEL,
)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({"name": "*gate"}, ["gate.linear_0"]),
        ({"name": "gate.linear_0"}, ["gate.linear_0"]),
        ({"not": "gate"}, ["up", "down", "sdpa_0.qk"]),
        ({"class": "Router"}, ["gate.linear_0"]),
        ({"class": "Linear"}, ["up", "down"]),
        ({"class": ["Wide", "Rout*"]}, ["gate.linear_0", "up"]),
        ({"class": "ModuleDict"}, ["sdpa_0.qk"]),
        ({"shape": {"n": "<16"}}, ["gate.linear_0"]),
    ],
)
def test_a_module_covers_the_products_it_writes_itself(match: dict[str, Any], expected: list[str]) -> None:
    condition = Match.model_validate(match)
    assert [site.name for site in FOUND if condition.matches(site)] == expected


def test_the_owner_is_told_by_the_name_where_no_model_is_at_hand() -> None:
    names = {"a.gate.linear_0": "a.gate", "a.sdpa_0.qk": "a", "matmul_1": "", "a.conv_transpose2d_0": "a"}
    assert {name: Site(name, "linear", None, 0, None, None).module for name in names} == names
    assert Site("layers.fc_1", "linear", 3, 9, 4, 4).module == "layers.fc_1"


def test_convolutions_are_told_by_their_geometry() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, (1, 3), groups=8), nn.Conv1d(8, 8, 1), nn.Linear(8, 8))
    sites = describe(
        [Site(str(i), op, i, 4, 8, 8) for i, op in enumerate(("conv2d", "conv2d", "conv1d", "linear"))], model
    )
    for shape, expected in (
        ({"kernel": 1}, "02"),
        ({"kernel": ">1"}, "1"),
        ({"groups": ">1"}, "1"),
        ({"groups": 1}, "02"),
        ({"kernel": "<9", "groups": 8, "n": 8}, "1"),
        ({"kernel": ">=0"}, "012"),
    ):
        match = Match.model_validate({"shape": shape})
        assert "".join(site.name for site in sites if match.matches(site)) == expected


def test_positions_count_leaves_that_are_called() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})
    sites = [Site(name, "linear", index, 4, 4, 4) for index, name in enumerate("abcd")]
    called = describe(sites, model, called={"b", "c"})
    ends = Match(position=("first", "last"))
    assert [site.name for site in called if ends.matches(site)] == ["b", "c"]
    assert [site.name for site in describe(sites, model) if ends.matches(site)] == ["a", "d"]


def test_layers_from_the_end_are_those_of_the_model_and_not_of_the_sites_at_hand() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(5)), nn.ReLU())
    condition = Match(layers="-1")  # type: ignore[call-arg]
    for number in range(5):
        (found,) = describe([Site(f"{number}.0", "linear", number, 5, 4, 4)], model)
        assert condition.matches(found) is (number == 4)
        rule = {"match": {"layers": "-1"}, "fwd": {"x": "e4m3"}}
        resolved = Policy.model_validate({"rules": [rule]}).resolve([found])
        assert (resolved.specs[found.name] is not None) is (number == 4)
