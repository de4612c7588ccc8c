"""Static checks: what of a policy does not fit a model is found, named, listed in every form, and refused if wrong."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lpcompile import Policy, lpcompile, report
from lpcompile.errors import LoweringError, LoweringWarning
from passes.finding import Finding, names_of
from runtime.numerics import quantize
from tests.lpcompile.checked import check_model


def _policy(*rules: dict) -> Policy:  # type: ignore[type-arg]
    return Policy(name="p", rules=rules)  # type: ignore[arg-type]


def _only(model: nn.Module, *rules: dict) -> Finding:  # type: ignore[type-arg]
    (finding,) = check_model(model, _policy(*rules))[1]
    return finding


def _linear(value: float | torch.Tensor, n: int = 32, k: int = 64) -> nn.Module:
    model = nn.Sequential(nn.Linear(k, n, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.as_tensor(value).expand(n, k))
    return model


def _tied() -> nn.Module:
    model = nn.ModuleDict({"embed_out": nn.Linear(8, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    model["head"].weight = model["embed_out"].weight
    return model


E4M3, E5M2 = {"fwd": {"x": "e4m3", "w": "e4m3"}}, {"fwd": {"x": "e4m3", "w": "e5m2"}}


def test_tied_weights_under_two_policies_name_both_sites_and_rules() -> None:
    finding = _only(_tied(), {"match": {"name": "head"}, **E5M2}, E4M3)
    assert (finding.code, finding.where, finding.is_wrong) == ("tied-weights", "embed_out and head", True)
    assert "as `e4m3 nearest_even` forward" in finding.what
    assert "in embed_out (rules[1])" in finding.what
    assert "`e5m2 nearest_even` forward" in finding.what
    assert "in head (rules[0])" in finding.what


def test_tied_weights_of_which_one_is_left_alone() -> None:
    finding = _only(_tied(), {"match": {"name": "head"}, **E4M3})
    assert "as it is in embed_out (no rule)" in finding.what


def test_tied_weights_under_one_policy_are_fine() -> None:
    assert check_model(_tied(), _policy(E4M3))[1] == []
    lpcompile(_tied(), _policy(E4M3), strict=True)


@pytest.mark.parametrize(
    ("match", "hint"),
    [
        ({"name": "*.boddy"}, "a name such as body"),
        ({"op": "conv2d"}, "an op of this model: linear"),
        ({"op": "matmul"}, "products of activations are found with example_inputs"),
        ({"name": "zzz"}, "lpcompile policy check FILE --model MODEL, which lists the GEMMs of a model: body"),
        ({"class": "Conv2d"}, "a class of this model: Linear"),
        ({"layers": "0"}, "a condition on names: no path of this model has a number"),
        ({"shape": {"k": ">=100000"}}, "a wider condition"),
    ],
)
def test_a_rule_that_matches_nothing_says_what_would(match: dict, hint: str) -> None:  # type: ignore[type-arg]
    model = nn.ModuleDict({"body": nn.Linear(8, 8)})
    finding = _only(model, {"match": match, **E4M3})
    assert (finding.code, finding.where, finding.is_wrong) == ("rule-matches-nothing", "rules[0]", True)
    assert "matched none of the 1 GEMMs" in finding.what
    assert hint in finding.hint


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1), nn.ReLU()])
def test_a_shipped_policy_that_names_nothing_is_told(layer: nn.Module) -> None:
    """Its rules are not told one by one: most models have no router."""
    with pytest.warns(LoweringWarning, match=r"none of its rules matched any of the [01] GEMMs") as told:
        model = lpcompile(nn.Sequential(layer), "fp8-rowwise")
    assert len(told) == 1
    assert [found.code for found in report(model).warnings] == ["policy-names-nothing"]
    with pytest.raises(LoweringError, match="policy-names-nothing"):
        lpcompile(nn.Sequential(copy.deepcopy(layer)), "fp8-rowwise", strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpcompile(nn.Sequential(copy.deepcopy(layer)), "fp32", strict=True)  # has no rule that sets anything


def test_strict_refuses_what_is_wrong_and_not_what_is_risky() -> None:
    with pytest.raises(LoweringError, match="tied-weights"):
        lpcompile(_tied(), _policy({"match": {"name": "head"}, **E5M2}, E4M3), strict=True)
    risky = lpcompile(_linear(1000.0), _policy(E4M3), strict=True)
    assert [finding.code for finding in report(risky).warnings] == ["weight-saturates"]


@pytest.mark.parametrize(
    ("format", "value", "code"),
    [
        ("e4m3", 448.0, None),
        ("e4m3", 449.0, "weight-saturates"),
        ("e4m3", 2.0**-10 * 1.01, None),
        ("e4m3", 2.0**-10 * 0.99, "weight-vanishes"),
        ("int8", 0.3, "weight-vanishes"),
        ("e2m1", 0.02, "weight-vanishes"),
        ({"format": "int8", "scale": {"granularity": "row"}}, 0.3, None),
        ({"format": "int8", "scale": {"rule": "pow2"}}, 1e-30, None),
        ({"format": "e4m3", "scale": {"rule": "pow2"}}, 1e-36, "weight-vanishes"),
        ({"format": "e4m3", "rounding": "stochastic"}, 1e-4, None),
        ("mxfp4", 1e-30, None),
        ("mxfp4", 2.0**-126, "weight-vanishes"),
        ("bf16", 1e-30, None),
    ],
)
def test_a_scale_that_does_not_reach_the_weights(format: str | dict, value: float, code: str | None) -> None:  # type: ignore[type-arg]
    rule = {"fwd": {"x": "e4m3", "w": format}, "bwd": {"dy": "e5m2", "w": format}}
    findings = check_model(_linear(value), _policy(rule))[1]
    assert [finding.code for finding in findings] == ([code] if code else [])
    assert all(finding.is_wrong == (code == "weight-vanishes") and finding.where == "0" for finding in findings)
    if code and isinstance(format, str) and not format.startswith("mx"):
        kept = float(quantize(torch.tensor(value), format))
        assert kept == 0 if code == "weight-vanishes" else kept < value


def test_most_of_a_weight_rounds_to_zero() -> None:
    torch.manual_seed(0)
    w = torch.randn(32, 64) * 0.3
    finding = _only(_linear(w), {"fwd": {"w": "e2m1"}, "bwd": {"w": "e2m1"}})
    share = float((quantize(w, "e2m1") == 0).float().mean())
    assert finding.code == "weight-mostly-zero"
    assert finding.what.startswith(f"{share:.0%} of the elements round to 0")
    assert not finding.is_wrong


def test_nvfp4_blocks_whose_scale_vanishes() -> None:
    w = torch.ones(32, 64)
    w[0, :16] = 1e-7
    finding = _only(_linear(w), {"fwd": {"w": "nvfp4"}})
    assert finding.code == "block-vanishes"
    assert finding.what.startswith("1 of 128 blocks become 0")
    assert int((quantize(w, "nvfp4") == 0).sum()) == 16
    assert check_model(_linear(torch.ones(32, 64)), _policy({"fwd": {"w": "nvfp4"}}))[1] == []


def test_layers_alike_are_told_once() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    for layer in model:
        nn.init.constant_(layer.weight, 1e-6)
    finding = _only(model, {"fwd": {"w": "e4m3"}, "bwd": {"w": "e4m3"}})
    assert finding.where == "0 and 3 more"
    assert names_of(["a"]) == "a"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_weight_of_no_finite_size_is_not_judged(value: float) -> None:
    assert check_model(_linear(value), _policy({"fwd": {"w": "int8"}}))[1] == []


def test_a_weight_that_is_not_here_is_not_judged() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    assert check_model(model, _policy({"fwd": {"w": "int8"}}))[1] == []


def test_every_form_of_the_certificate_lists_them(tmp_path: Path) -> None:
    model = _linear(1000.0, k=4096)
    rule = {"fwd": {"x": "e4m3", "w": "e4m3", "accumulate": "bf16"}}
    found = report(lpcompile(model, _policy(rule, {"match": {"name": "nothing"}, **E4M3})))
    codes = ["rule-matches-nothing", "weight-saturates", "accumulator-swamps"]
    assert [finding.code for finding in found.warnings] == codes
    told = json.loads(found.to_json())["warnings"]
    assert [set(each) for each in told] == [{"code", "where", "what", "hint", "is_wrong"}] * 3
    page = found.to_html(tmp_path / "c.html").read_text(encoding="utf-8")
    for finding in found.warnings:
        assert f"warning: {finding}" in found.to_text()
        assert finding.code in page


def test_every_phase_is_checked() -> None:
    policy = Policy.model_validate(
        {
            "rules": [{"fwd": {"w": "int8"}}],
            "schedule": [{"from_step": 0, "policy": {"name": "fp32", "rules": []}}, {"from_step": 5}],
        }
    )
    model = lpcompile(_linear(0.1), policy)
    assert [finding.code for finding in report(model).warnings] == ["weight-vanishes"], "of a phase that is to come"
    with pytest.raises(LoweringError, match="weight-vanishes"):
        lpcompile(_linear(0.1), policy, strict=True)


def test_a_module_that_holds_products_is_answered_with_them() -> None:
    model = nn.ModuleDict({"mlp": nn.ModuleDict({name: nn.Linear(8, 8) for name in ("up", "down", "a", "b")})})
    finding = _only(model, {"match": {"name": "mlp"}, **E4M3})
    assert finding.hint == '"mlp.*" for the products under it: mlp.up, mlp.down, mlp.a and 1 more'


def test_one_expert_of_fused_ones_is_answered_with_the_product_of_all() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    finding = _only(transformers.MixtralForCausalLM(config), {"match": {"name": "*.experts.3.*"}, **E4M3})
    assert "model.layers.0.mlp.experts.gate_up_proj" in finding.hint
    assert "all experts of a module are one product" in finding.hint


def test_a_rule_that_decides_nothing_is_wrong() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    whole = {role: {} for role in ("fwd", "bwd", "grad")}
    rules = {"match": {"op": "linear"}, **whole}, {"match": {"name": "head"}, "fwd": {"x": "bf16"}}
    finding = _only(model, *rules)
    assert (finding.code, finding.where, finding.is_wrong) == ("rule-decides-nothing", "rules[1]", True)
    assert finding.what == "(name head) decides nothing: of its 1 GEMMs every role is decided above it"
    assert finding.hint == "it before rules[0], or not at all"
    with pytest.raises(LoweringError, match="rule-decides-nothing"):
        lpcompile(model, _policy(*rules), strict=True)


@pytest.mark.parametrize("operand", ["w", "x", "dy"])
def test_signed_values_in_an_unsigned_format_are_told(operand: str) -> None:
    unsigned = {"format": "uint8", "scale": {"granularity": "row"}}
    role = {"w": "fwd", "x": "fwd", "dy": "bwd"}[operand]
    (finding,) = check_model(nn.Linear(8, 8), _policy({role: {operand: unsigned}}))[1]
    assert finding.code == "unsigned-operand"
    assert "become 0" in finding.what
    affine = {"format": "uint8:zero=128", "scale": {"granularity": "row"}}
    assert check_model(nn.Linear(8, 8), _policy({role: {operand: affine}}))[1] == []


def test_a_result_in_fp32_of_a_bf16_model_says_what_happens() -> None:
    finding = _only(nn.Linear(8, 8).to(torch.bfloat16), {"fwd": {"x": "bf16", "out": "fp32"}})
    assert finding.code == "rounded-again"
    assert "a result leaves the layer rounded to bfloat16" in finding.what
    assert check_model(nn.Linear(8, 8), _policy({"fwd": {"x": "bf16", "out": "fp32"}}))[1] == []
    assert check_model(nn.Linear(8, 8).to(torch.bfloat16), _policy({"fwd": {"x": "bf16"}}))[1] == []


def test_a_format_without_signs_is_told_without_a_scale_too() -> None:
    torch.manual_seed(0)
    codes = [each.code for each in check_model(_linear(torch.randn(32, 64)), _policy({"fwd": {"w": "e8m0"}}))[1]]
    assert "unsigned-operand" in codes


@pytest.mark.parametrize(
    ("cast", "sums", "k", "code"),
    [
        ("e5m2", "dlfloat16", 4096, "accumulator-drifts"),
        ("e5m2", "1-6-9", 4096, None),
        ("e5m2", {"format": "dlfloat16", "chunk": 64}, 4096, None),
        ({"format": "int8", "scale": {"granularity": "row"}}, "int16", 64, "accumulator-saturates"),
        ({"format": "int8", "scale": {"granularity": "row"}}, "fp16", 8, "accumulator-saturates"),
        ({"format": "int8", "scale": {"granularity": "row"}}, "int32", 4096, None),
        ({"format": "int8", "scale": {"granularity": "row"}}, "int16", 2, None),
    ],
)
def test_sums_that_drift_or_saturate_are_told(cast: str | dict, sums: str | dict, k: int, code: str | None) -> None:  # type: ignore[type-arg]
    torch.manual_seed(0)
    rule = {"fwd": {"x": cast, "w": cast, "accumulate": sums}}
    model = lpcompile(nn.Sequential(nn.Linear(k, 8, bias=False)), _policy(rule))
    assert [each.code for each in report(model).warnings] == ([code] if code else [])


class _Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("examples", [None, (torch.ones(2, 32),)])
def test_a_rule_of_sizes_that_no_call_has_shown_is_not_called_dead(examples: tuple[torch.Tensor] | None) -> None:
    """A router's weight is multiplied by a function, whose sizes are known when it runs."""
    rules = ({"match": {"op": "linear", "shape": {"n": "<16"}}, **E5M2}, {"match": {"op": "linear"}, **E4M3})
    model = lpcompile(nn.Sequential(nn.Linear(32, 32), _Router()), _policy(*rules), examples, strict=True)
    model(torch.ones(2, 32))
    assert {row.rule for row in report(model).gemms if row.name == "1.linear_0" and row.role == "fwd"} == {"rules[0]"}


def test_a_policy_of_products_that_no_call_has_shown_is_not_told() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.mT

    model = lpcompile(Product(), "fp32-emulated", strict=True)
    model(torch.ones(3, 4))
    assert len(report(model).called) == 3
