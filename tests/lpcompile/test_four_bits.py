"""Four bits: gradients under mxfp4, nvfp4, quartet2 against float64 with the same random bits; by every front end."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lpcompile import Policy, advance, compile_joint, lpcompile, report
from lpcompile.errors import LoweringWarning
from runtime.numerics import quantize
from runtime.numerics.hadamard import FIXED_SIGNS, parts, signs_of
from runtime.numerics.transform_specs import TransformSpec
from tests.machine_facts import needs_compiler

SEED = 11
FIRST = 1 << 22
"""The stream of slot 0 of site 0 in the first micro-batch, number 1: runtime/streams.py."""
MX, NV, FOUR_SIX, EDEN, TILES = (
    "mxfp4:scale=rceil", "nvfp4", "nvfp4:scale=four-six", "nvfp4:scale=eden", "nvfp4-2d",
)  # fmt: skip
NEAR, CHANCE = "nearest_even", "stochastic"
T32, T16, T128 = TransformSpec("hadamard32", "random"), TransformSpec("hadamard16", "fixed", "bf16"), TransformSpec(
    "hadamard128", "random"
)  # fmt: skip
RECIPES: dict[str, dict[str, tuple[Any, Any]]] = {
    "mxfp4": {
        "fwd": ((MX, NEAR, None), (MX, NEAR, None)),
        "bwd": ((MX, CHANCE, T32), (MX, CHANCE, T32)),
        "grad": ((MX, CHANCE, T32), (MX, CHANCE, T32)),
    },
    "nvfp4": {
        "fwd": ((NV, NEAR, None), (TILES, NEAR, None)),
        "bwd": ((NV, CHANCE, None), (TILES, NEAR, None)),
        "grad": ((NV, CHANCE, T16), (NV, NEAR, T16)),
    },
    "quartet2": {
        "fwd": ((FOUR_SIX, NEAR, None), (FOUR_SIX, NEAR, None)),
        "bwd": ((EDEN, CHANCE, T128), (EDEN, CHANCE, T128)),
        "grad": ((EDEN, CHANCE, T128), (EDEN, CHANCE, T128)),
    },
}
"""Format, rounding and transform of the two operands of each GEMM, written by hand."""
SLOTS = {"fwd": (0, 1), "bwd": (4, 6), "grad": (5, 3)}
SIGNS = {"fwd": 10, "bwd": 11, "grad": 12}
SHAPES = [((7, 40), 17), ((3, 50, 80), 48), ((1, 1), 1), ((5, 130), 3)]


def _hadamard(n: int) -> Tensor:
    """Sylvester's: (-1) to the number of bits that i and j both have."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.float64)


def _turned(lanes: Tensor, transform: TransformSpec, slot: int) -> Tensor:
    """By a matrix in float64, along the last dim, rounded to fp32 and where asked to bf16."""
    signs = torch.tensor(FIXED_SIGNS * 8)[: transform.size].double()
    if transform.is_random:
        signs = signs_of(transform, seed=SEED, stream=FIRST + slot).double()
    pieces = []
    for at, count, n in parts(lanes.shape[-1], transform.size):
        matrix = signs[:n, None] * _hadamard(n) / n**0.5
        pieces.append((lanes[..., at : at + count].double().unflatten(-1, (-1, n)) @ matrix).flatten(-2))
    turned = torch.cat(pieces, -1).float()
    return turned.bfloat16().float() if transform.round == "bf16" else turned


def _cast(lanes: Tensor, cast: tuple[str, Any, TransformSpec | None], role: str, slot: int) -> Tensor:
    """The values of one operand, the sum along its last dim, in float64."""
    format, rounding, transform = cast
    lanes = lanes.contiguous() if transform is None else _turned(lanes.contiguous(), transform, SIGNS[role])
    return quantize(lanes, format, rounding, seed=SEED, step=0, stream=FIRST + slot).double()


def _reference(x: Tensor, w: Tensor, dy: Tensor, recipe: dict[str, tuple[Any, Any]]) -> dict[str, Tensor]:
    x_MK, dy_MN = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    operands = {"fwd": (x_MK, w), "bwd": (dy_MN, w.t()), "grad": (dy_MN.t(), x_MK.t())}
    found = {}
    for role, pair in operands.items():
        a, b = (
            _cast(lanes, cast, role, slot) for lanes, cast, slot in zip(pair, recipe[role], SLOTS[role], strict=True)
        )
        found[role] = a @ b.t()
    return {"y": found["fwd"].view(dy.shape), "dx": found["bwd"].view(x.shape), "dw": found["grad"]}


def _policy(name: str) -> Policy:
    """The rule of the recipe, for every linear layer."""

    def operand(cast: tuple[str, str, TransformSpec | None]) -> dict[str, Any]:
        format, rounding, t = cast
        transform = {} if t is None else {"transform": {"kind": t.kind, "signs": t.signs, "round": t.round}}
        return {"format": format, "rounding": rounding, **transform}

    sides = {"fwd": ("x", "w"), "bwd": ("dy", "w"), "grad": ("dy", "x")}
    rule = {
        role: dict(zip(sides[role], map(operand, pair), strict=True)) for role, pair in RECIPES[name].items()
    }  # fmt: skip
    return Policy.model_validate({"name": name, "rules": [{"match": {"op": "linear"}, **rule}]})


def _run(model: nn.Module, layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    given = x.clone().requires_grad_()
    layer.zero_grad()
    y = model(given)
    y.backward(dy)
    assert given.grad is not None
    assert isinstance(layer.weight.grad, Tensor)
    return {"y": y.detach(), "dx": given.grad, "dw": layer.weight.grad.clone()}


def _close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Up to the order of fp32 sums, and to one element in a thousand whose turned value lay next to a tie, where the
    float64 of the reference is on the other side."""
    for key, each in wanted.items():
        off = (found[key].double() - each).norm() / each.norm().clamp(min=1e-30)
        assert off < 2e-3, (key, float(off))
    assert ((found["y"].double() - wanted["y"]).abs() <= 1e-5 * wanted["y"].abs().max()).all()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("shape", "features"), SHAPES)
def test_a_layer_is_what_float64_says(name: str, shape: tuple[int, ...], features: int) -> None:
    source = torch.Generator().manual_seed(3)
    x, dy = torch.randn(shape, generator=source), torch.randn((*shape[:-1], features), generator=source)
    layer = nn.Linear(shape[-1], features, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(features, shape[-1], generator=source))
    wanted = _reference(x, layer.weight.detach(), dy, RECIPES[name])
    found = _run(lpcompile(layer, _policy(name), example_inputs=(x,), seed=SEED), layer, x, dy)
    assert [row.fidelity for row in report(layer).gemms if row.fidelity == "refused"] == []
    _close(found, wanted)


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_recipe_is_the_one_written_here(name: str) -> None:
    x, dy = torch.randn(6, 40), torch.randn(6, 24)
    found = []
    for policy in (name, _policy(name)):
        torch.manual_seed(0)
        layer = nn.Linear(40, 24, bias=False)
        model = nn.ModuleDict({"middle": layer})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoweringWarning)  # which rules match nothing
            lpcompile(model, policy, seed=SEED)
        found.append(_run(layer, layer, x, dy))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("name", RECIPES)
def test_an_input_features_first_weight(name: str) -> None:
    """transformers' Conv1D holds w_KN: the same values, blocks and random bits in other places in memory."""
    x, dy = torch.randn(7, 40), torch.randn(7, 17)
    layer = Conv1D(17, 40)
    wanted = _reference(x, layer.weight.detach().t(), dy, RECIPES[name])
    found = _run(lpcompile(layer, _policy(name), example_inputs=(x,), seed=SEED), layer, x, dy)
    _close(found, wanted | {"dw": wanted["dw"].t()})


ALL = {
    "fwd": {key: {"format": "nvfp4", "transform": {"kind": "hadamard16", "signs": "random"}} for key in ("x", "w")},
    "bwd": {
        "dy": {"format": "mxfp4", "rounding": "stochastic", "transform": "hadamard32"},
        "w": {"format": "e4m3", "transform": "hadamard32"},
    },
    "grad": {
        key: {
            "format": "nvfp4:scale=eden", "rounding": "stochastic",
            "transform": {"kind": "hadamard128", "signs": "random"},
        }
        for key in ("dy", "x")
    },
}  # fmt: skip
"""A transform in all three GEMMs."""
TURNED = Policy.model_validate({"name": "turned", "rules": [{"match": {"op": ["linear", "matmul"]}, **ALL}]})


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(40, 17), nn.Linear(17, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        return y + torch.softmax(torch.matmul(x, y.transpose(-1, -2)), -1) @ y


FRONT_ENDS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda model: model,
    "graph": lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
    "joint": lambda model: compile_joint(model, backend="aot_eager"),
}


@pytest.mark.parametrize("policy", [TURNED, "mxfp4", "quartet2"])
def test_every_front_end_has_the_same_bits(policy: Policy | str) -> None:
    x, found = torch.randn(2, 7, 40), {}
    for name, compiled in FRONT_ENDS.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = lpcompile(_Net(), policy, example_inputs=(x,))
        assert [(row.name, row.reason) for row in report(model).gemms if row.fidelity == "refused"] == []
        run, steps = compiled(model), []
        for _ in range(2):
            given = x.clone().requires_grad_()
            model.zero_grad()
            y = run(given)
            y.square().sum().backward()
            assert given.grad is not None
            steps += [y.detach(), given.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            advance(model)
        found[name] = steps
    half = len(found["eager"]) // 2
    assert not torch.equal(found["eager"][1], found["eager"][half + 1]), "each step draws its own bits"
    for name, steps in found.items():
        assert all(torch.equal(a, b) for a, b in zip(steps, found["eager"], strict=True)), name


@needs_compiler
def test_inductor_keeps_the_bits_of_products() -> None:
    x = torch.randn(7, 40)
    found = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        layer = nn.Linear(40, 17, bias=False)
        model = lpcompile(layer, TURNED, example_inputs=(x,))
        found.append(_run(torch.compile(model, fullgraph=True) if is_compiled else model, layer, x, torch.ones(7, 17)))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_graph_for_inference_has_the_transform() -> None:
    x = torch.randn(2, 7, 40)
    found = []
    for mode in ("train", "infer"):
        torch.manual_seed(0)
        model = lpcompile(_Net().eval(), TURNED, example_inputs=(x,), mode=mode)  # type: ignore[arg-type]
        with torch.no_grad():
            found.append(model(x))
    assert torch.equal(*found)
    assert report(model).unserved == ""


def test_a_convolution_is_refused_with_a_sentence() -> None:
    rule = {
        "match": {"op": "conv2d"},
        "fwd": {key: {"format": "e4m3", "transform": "hadamard16"} for key in ("x", "w")},
    }
    policy = Policy.model_validate({"name": "p", "rules": [rule]})
    with pytest.warns(LoweringWarning):
        model = lpcompile(nn.Conv2d(3, 4, 3), policy, example_inputs=(torch.randn(1, 3, 8, 8),))
    (row,) = [row for row in report(model).gemms if row.role == "fwd"]
    assert row.fidelity == "refused"
    assert row.reason == (
        "fwd x: hadamard16 turns an operand along one axis, and the sum of a conv2d has several; use no transform"
    )


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-2d", "mxfp4"])
def test_poisoned_padding_is_never_read(name: str) -> None:
    """K = 40, M = 7, N = 17 as a part of larger tensors of NaN."""
    operand = {"format": name, "transform": "hadamard16"}
    rule = {
        "fwd": {"x": operand, "w": operand},
        "bwd": {"dy": operand, "w": operand},
        "grad": {"dy": operand, "x": operand},
    }
    policy = Policy.model_validate({"name": "p", "rules": [{"match": {"op": "linear"}, **rule}]})
    torch.manual_seed(0)
    layer = nn.Linear(40, 17, bias=False)
    large, cotangent = torch.full((9, 64), torch.nan), torch.full((9, 32), torch.nan)
    large[:7, :40], cotangent[:7, :17] = torch.randn(7, 40), torch.randn(7, 17)
    model = lpcompile(layer, policy, example_inputs=(torch.randn(7, 40),))
    part = _run(model, layer, large[:7, :40], cotangent[:7, :17])
    whole = _run(model, layer, large[:7, :40].clone(), cotangent[:7, :17].clone())
    assert all(part[key].isfinite().all() and torch.equal(part[key], whole[key]) for key in part)


def _mean_gradient(name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of dw over `count` steps: the mean, its standard error, and what float64 gives without casts."""
    torch.manual_seed(0)
    layer, x, dy = nn.Linear(128, 8, bias=False), torch.randn(128, 128), torch.randn(128, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoweringWarning)
        model = lpcompile(layer, name, example_inputs=(x,))
    found = []
    for _ in range(count):
        found.append(_run(model, layer, x, dy)["dw"].double())
        advance(model)
    draws = torch.stack(found)
    return draws.mean(0), draws.std(0) / count**0.5, dy.double().t() @ x.double()


def test_the_gradient_of_quartet2_has_no_bias() -> None:
    """MS-EDEN, both operands of GRAD, the rotation undone by the product: every element within 5 standard errors, their
    mean square as it is for chance, and no shrinking of the whole."""
    mean, error, exact = _mean_gradient("quartet2", 400)
    z = (mean - exact) / error
    assert z.abs().max() < 5
    assert 0.8 < z.square().mean() < 1.25
    share = (mean * exact).sum() / exact.square().sum()
    assert abs(share - 1) < 5 * (error * exact).norm() / exact.square().sum() + 5e-4


def test_the_gradient_of_nvfp4_shrinks_as_its_source_does() -> None:
    """Stochastic dy and nearest x, each clipped by scales that are rounded down: the share kept is below 1, and that of
    dy alone 0.9966 (algorithms.md, 0.4)."""
    mean, error, exact = _mean_gradient("nvfp4", 200)
    share = (mean * exact).sum() / exact.square().sum()
    assert 0.985 < share < 0.9985
    assert ((mean - exact) / error).square().mean() > 2, "x is rounded to nearest: the same error in every draw"
