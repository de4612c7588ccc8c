"""Recipes: every shipped policy runs on layers and convolutions as it says, and computes what a reference does."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lpcompile import advance, load_policy, lpcompile, report
from lpcompile.compiled import get_compiled
from lpcompile.errors import PolicyError
from lpcompile.policy.file import shipped_policies
from lpcompile.policy.recipes_page import to_markdown
from lpcompile.policy.resolve import Policy
from runtime.kernels.cast.scales import compute_scale
from runtime.numerics import quantize
from runtime.numerics.specs import ROLES, GemmSpec, LayerSpec, QuantSpec
from tests.differential.reference import Reference

NAMES = sorted(shipped_policies())
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


class Net(nn.Module):
    """Convolutions, depthwise too, and layers; sizes that no block divides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.point = nn.Conv2d(8, 20, 1)
        self.up = nn.Linear(20, 40)
        self.down = nn.Linear(40, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(torch.relu(self.depthwise(torch.relu(self.stem(x))))).flatten(2).transpose(1, 2)
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def _net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(6, 3, 9, 9)


def _step(model: nn.Module, x: Tensor, grow: float = 1.0) -> dict[str, Tensor]:
    model.zero_grad()
    y = model(x)
    (y.square().mean() * grow).backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_every_row_runs_as_the_policy_says(name: str) -> None:
    model, x = _net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(grow in|nothing applies it).*")
        lpcompile(model, load_policy(name).over(10), example_inputs=(x,))
        first = _step(model, x)
        advance(model)
        second = _step(model, x)
    found = report(model)
    assert [row for row in found.gemms if row.fidelity == "refused"] == []
    assert all(bool(g.isfinite().all()) for g in first.values())
    specs = [spec for spec in load_policy(name).resolve(get_compiled(model).sites).specs.values() if spec]
    is_stochastic = any(spec.role(role).is_stochastic for spec in specs for role in ROLES)
    grads = [key for key in first if key not in ("y",) and not key.startswith("_lp")]
    assert all(torch.equal(first[key], second[key]) for key in grads) is not is_stochastic


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("fp32", "bf16", "fp16", "dlfloat16")])
def test_values_and_gradients_are_those_of_the_reference(name: str) -> None:
    """Rounded to nearest and summed in fp32, and without quantizers that learn, layer by layer."""
    policy = load_policy(name)
    for layer, shape in ((nn.Linear(20, 24), (3, 7, 20)), (nn.Conv2d(4, 6, 3, stride=2), (3, 4, 9, 9))):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Identity(), layer)
        x = torch.randn(shape)
        (spec,) = _resolved(policy, model, x)
        if spec is None or _learns(spec) or _turns(spec):
            continue
        plain = _plain(spec)
        one = lpcompile(nn.Sequential(nn.Identity(), layer), _policy_of(plain), example_inputs=(x,))
        given = x.clone().requires_grad_()
        ours = {**_step(one, given), "x": given.grad}
        other = x.clone().requires_grad_()
        layer.zero_grad()
        with Reference(plain):
            y = layer(other)
        y.square().mean().backward()
        wanted = {"y": y.detach(), "x": other.grad, "1.weight": layer.weight.grad}
        for key, tensor in wanted.items():
            assert tensor is not None
            torch.testing.assert_close(ours[key], tensor, rtol=2e-5, atol=2e-6, msg=lambda text, k=key: f"{k}: {text}")


def _resolved(policy: Policy, model: nn.Module, x: Tensor) -> list[LayerSpec | None]:
    """Of the layer as one between others."""
    net, image = _net()
    specs = policy.resolve(get_compiled(lpcompile(net, "fp32-emulated", example_inputs=(image,))).sites).specs
    return [specs["up" if isinstance(model[1], nn.Linear) else "point"]]


def _learns(spec: LayerSpec) -> bool:
    return any(each.quantizer for role in ROLES for each in (spec.role(role).lhs, spec.role(role).rhs))


def _turns(spec: LayerSpec) -> bool:
    """Has a transform: test_four_bits.py has those."""
    return any(each.transform for role in ROLES for each in (spec.role(role).lhs, spec.role(role).rhs))


def _plain(spec: LayerSpec) -> LayerSpec:
    def near(operand: QuantSpec) -> QuantSpec:
        return replace(operand, rounding="nearest_even") if operand.is_stochastic else operand

    return LayerSpec(*(GemmSpec(near(spec.role(r).lhs), near(spec.role(r).rhs)) for r in ROLES))


def _policy_of(spec: LayerSpec) -> Policy:
    def operand(each: QuantSpec) -> dict[str, object]:
        scale = (
            {} if each.scale is None else {"scale": {"granularity": each.scale.granularity, "rule": each.scale.rule}}
        )
        if each.scale is not None and each.scale.granularity == "block":
            scale["scale"]["block"] = list(each.scale.block)  # type: ignore[assignment]
        return {"format": each.format, "rounding": each.rounding, **scale}

    sides = {"fwd": ("x", "w"), "bwd": ("dy", "w"), "grad": ("dy", "x")}
    rule = {
        role: {sides[role][0]: operand(spec.role(role).lhs), sides[role][1]: operand(spec.role(role).rhs)}
        for role in ROLES
    }
    return Policy.model_validate({"name": "plain", "rules": [rule]})


def test_two_phases_share_a_scale_and_err_the_other_way() -> None:
    """Relative squared errors on log-uniform numbers: .13 each, .048 of the mean (reference: section 2.3)."""
    x = torch.logspace(-1, 2.1, 20001, base=4.0)[torch.randperm(20001, generator=torch.Generator().manual_seed(0))]
    values = []
    for format in ("fp4-radix4", "fp4-radix4-odd"):
        scale = compute_scale(x, QuantSpec.parse(f"{format} nearest_away tensor/pow2"))
        assert scale is not None
        assert float(scale) == 0.5
        values.append(quantize(x, format, scale=scale))
    even, odd = values
    assert torch.equal(odd[x < 12], quantize(2 * x, "fp4-radix4", scale=scale)[x < 12] / 2)
    inside = x < 12  # beyond it the odd phase saturates

    def error(q: Tensor) -> float:
        return float(((q - x) / x)[inside].square().mean())

    assert error(even) == pytest.approx(0.134, abs=0.02)
    assert error(odd) == pytest.approx(0.134, abs=0.02)
    assert error((even + odd) / 2) == pytest.approx(0.048, abs=0.01)


def test_sawb_is_the_published_clip() -> None:
    """Clips and values of section 7.11, by the coefficients for 15 and 3 levels."""
    w = torch.tensor([-1.5, -0.9, -0.4, -0.1, 0.05, 0.2, 0.45, 0.8, 1.1, 2.0])
    for format, largest, clip in (("int4", 7, 2.599223), ("int2", 1, 1.228217)):
        scale = compute_scale(w, QuantSpec.parse(f"{format} nearest_even tensor/sawb"))
        assert scale is not None
        assert float(scale) * largest == pytest.approx(clip, abs=1e-5)
    assert quantize(w, "int2", scale=scale).tolist() == pytest.approx([-clip, -clip, *[0] * 5, *[clip] * 3], abs=1e-5)
    with pytest.raises(PolicyError, match="sawb is for weights"):
        Policy.model_validate({"rules": [{"fwd": {"x": {"format": "int4", "scale": {"rule": "sawb"}}}}]})
    with pytest.raises(PolicyError, match="few levels"):
        Policy.model_validate({"rules": [{"fwd": {"w": {"format": "int8", "scale": {"rule": "sawb"}}}}]})


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_sawb_is_nearly_the_best_clip(bits: int) -> None:
    """On each of six distributions the squared error is within 10 % of the least over clips, for 3 and 15 levels."""
    draw = torch.Generator().manual_seed(bits)
    u = torch.rand(20000, generator=draw)
    sign = torch.sign(torch.rand(20000, generator=draw) - 0.5)
    shapes = [
        torch.randn(20000, generator=draw), u * 2 - 1, -torch.log(u) * sign,
        torch.logit(u.clamp(1e-4, 1 - 1e-4)), u + torch.rand(20000, generator=draw) - 1,
    ]  # fmt: skip
    for x in shapes:
        for format in ("int4", "int2"):
            spec = QuantSpec.parse(f"{format} nearest_even tensor/sawb")
            scale = compute_scale(x, spec)
            assert scale is not None
            best = min(
                float((quantize(x, format, scale=float(scale) * f) - x).square().mean())
                for f in torch.linspace(0.5, 1.6, 23).tolist()
            )
            assert float((quantize(x, format, scale=scale) - x).square().mean()) < 1.12 * best


def test_luq_is_unbiased_below_its_smallest_too() -> None:
    x = torch.tensor([[16.0, 0.2, 0.7, 1.3, 5.0, -0.1, -11.0, 0.0]])
    spec = QuantSpec.parse("fp4-luq stochastic tensor/amax")
    scale = compute_scale(x, spec)
    assert float(scale) == 1.0  # type: ignore[arg-type]
    draws = torch.stack([quantize(x, "fp4-luq", "stochastic", scale=scale, step=i) for i in range(4000)])
    assert set(draws.abs().unique().tolist()) <= {0.0, 1.0, 2.0, 4.0, 8.0, 16.0}
    spread = draws.double().std(0) / 4000**0.5
    assert bool(((draws.double().mean(0) - x).abs() <= 4.5 * spread).all())


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == to_markdown(), (
        "run: python -m lpcompile.policy.recipes_page > docs/recipes.md"
    )
