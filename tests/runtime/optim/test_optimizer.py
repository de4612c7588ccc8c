"""What the optimizers share: bytes as allocated, states that are loaded as they were saved, refusals, places."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from runtime.errors import LpError, NotSupported
from runtime.optim.adamw import LowPrecisionAdamW
from runtime.optim.formats import UpdateFormats
from runtime.optim.optimizer import AbstractOptimizer
from runtime.optim.sgd import LowPrecisionSGD

KINDS: list[tuple[type[AbstractOptimizer], UpdateFormats, torch.dtype, float]] = [
    (LowPrecisionAdamW, UpdateFormats(), torch.float32, 12),
    (LowPrecisionAdamW, UpdateFormats(), torch.bfloat16, 14),
    (LowPrecisionAdamW, UpdateFormats("bf16+16"), torch.bfloat16, 12),
    (LowPrecisionAdamW, UpdateFormats("bf16+16", "bf16", "bf16"), torch.bfloat16, 8),
    (LowPrecisionAdamW, UpdateFormats("bf16", "bf16", "bf16", "stochastic"), torch.bfloat16, 6),
    (LowPrecisionAdamW, UpdateFormats("bf16", "e4m3", "e5m2", "stochastic"), torch.bfloat16, 4),
    (LowPrecisionSGD, UpdateFormats(), torch.float32, 8),
    (LowPrecisionSGD, UpdateFormats("dlfloat16", "dlfloat16", rounding="stochastic"), torch.float32, 6),
    (LowPrecisionSGD, UpdateFormats("dlfloat16", "1-5-2", rounding="stochastic"), torch.bfloat16, 5),
    (LowPrecisionSGD, UpdateFormats("1-7-12", "1-7-12"), torch.bfloat16, 10),
]


def _trained(kind: tuple[type[AbstractOptimizer], UpdateFormats, torch.dtype, float]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape).to(kind[2])) for shape in ((33, 7), (5,))]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.5, "lr": 0.02}]
    optimizer = kind[0](groups, lr=0.01, formats=kind[1], seed=3)  # type: ignore[arg-type, call-arg]
    _steps(weights, optimizer, 3)
    return weights, optimizer


def _steps(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}-{kind[2]}")
def test_bytes_are_those_allocated(kind: Any) -> None:
    weights, optimizer = _trained(kind)
    total = 0
    for weight in weights:
        kept = [value for name, value in optimizer.state[weight].items() if name != "step"]
        total += sum(value.untyped_storage().nbytes() for value in (weight, *kept))
    count = sum(weight.numel() for weight in weights)
    assert optimizer.bytes_per_parameter() == kind[3] == total / count
    states = [optimizer.state[weight].items() for weight in weights]
    masters = sum(value.nbytes for state in states for name, value in state if name in ("master", "remainder"))
    parts = optimizer.bytes_by_part()
    assert parts["master"] == masters / count
    assert parts["weight"] == parts["gradient"] == sum(weight.nbytes for weight in weights) / count
    assert parts["moments"] == kind[3] - parts["master"] - parts["weight"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}-{kind[2]}")
def test_a_loaded_state_goes_on_with_the_same_bits(kind: Any) -> None:
    weights, optimizer = _trained(kind)
    file = io.BytesIO()
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    copies = [nn.Parameter(weight.detach().clone()) for weight in saved["weights"]]
    resumed = kind[0]([{"params": copies[:1]}, {"params": copies[1:]}], formats=kind[1], seed=99)
    resumed.load_state_dict(saved["optimizer"])
    for weight, other in zip(weights, copies):
        for name, value in optimizer.state[weight].items():
            assert resumed.state[other][name].dtype == value.dtype
            assert torch.equal(resumed.state[other][name], value), name
    assert [group["lr"] for group in resumed.param_groups] == [0.01, 0.02]
    _steps(weights, optimizer, 4)
    _steps(copies, resumed, 4)
    assert all(torch.equal(weight, other) for weight, other in zip(weights, copies))


def test_what_is_loaded_is_a_copy() -> None:
    weights, optimizer = _trained(KINDS[3])
    state = optimizer.state_dict()
    kept = copy.deepcopy(state["state"])
    other = LowPrecisionAdamW(_groups(weights), formats=KINDS[3][1])
    other.load_state_dict(state)
    _steps(weights, other, 1)
    assert all(torch.equal(state["state"][i][name], kept[i][name]) for i in kept for name in kept[i])


def _groups(weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": weights[:1]}, {"params": weights[1:]}]


def test_a_state_of_torch_in_fp32_is_taken() -> None:
    """And goes on; but for an ulp of torch's square root."""
    weight, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    theirs, ours = torch.optim.AdamW([weight], lr=0.1), LowPrecisionAdamW([other])
    _steps([weight], theirs, 3)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    with torch.no_grad():
        other.copy_(weight)
    _steps([weight], theirs, 2)
    _steps([other], ours, 2)
    assert torch.allclose(weight, other, rtol=3e-7, atol=0)
    assert torch.equal(ours.state[other]["exp_avg_sq"], theirs.state[weight]["exp_avg_sq"])


def test_a_state_of_another_kind_is_refused() -> None:
    weights, optimizer = _trained(KINDS[3])
    state = optimizer.state_dict()
    where = "LowPrecisionAdamW.load_state_dict: "
    other = LowPrecisionAdamW(_groups(weights), formats=UpdateFormats("bf16", "bf16", "bf16"))
    with pytest.raises(
        LpError, match=where + "the state was kept under another `master_format`. Expected bf16. Got bf16.16"
    ):
        other.load_state_dict(state)
    with pytest.raises(LpError, match="of other groups of parameters"):
        LowPrecisionAdamW(weights, formats=KINDS[3][1]).load_state_dict(state)
    wrong = copy.deepcopy(state)
    wrong["state"][0]["exp_avg"] = wrong["state"][0]["exp_avg"].float()
    with pytest.raises(
        LpError, match=r"`exp_avg` does not fit\. Expected torch.bfloat16 of \(33, 7\)\. Got torch.float32"
    ):
        optimizer.load_state_dict(wrong)
    del wrong["state"][0]["exp_avg"]
    with pytest.raises(LpError, match=r"the state is of another kind\. Expected step, exp_avg, exp_avg_sq, remainder"):
        optimizer.load_state_dict(wrong)


def test_a_remainder_needs_bf16_parameters() -> None:
    with pytest.raises(NotSupported, match=r"bf16.16 is a bf16 parameter and its remainder\. Expected bf16 parameters"):
        LowPrecisionAdamW([nn.Parameter(torch.ones(1))], formats=UpdateFormats("bf16+16"))


def test_parameters_without_a_gradient_and_transposed_ones() -> None:
    formats = UpdateFormats("bf16", "bf16", "bf16", "stochastic")
    ends = []
    for is_transposed in (False, True):
        held = torch.ones(4, 6, dtype=torch.bfloat16)
        weight = nn.Parameter(held.t().contiguous().t() if is_transposed else held)
        idle = nn.Parameter(torch.ones(3))
        optimizer = LowPrecisionAdamW([idle, weight], formats=formats)
        for _ in range(3):
            weight.grad = torch.arange(24.0).view(4, 6).bfloat16() - 12
            optimizer.step()
        assert not optimizer.state[idle]
        ends.append(weight.detach().contiguous())
    assert torch.equal(*ends)


def test_a_master_narrower_than_its_parameter() -> None:
    """It rounds the parameter at the first step; a gradient of 0 then changes nothing."""
    weight = nn.Parameter(torch.tensor([0.3, -1e-3, 7.77]))
    optimizer = LowPrecisionSGD([weight], formats=UpdateFormats("1-5-2", "1-5-2"))
    for _ in range(3):
        weight.grad = torch.zeros(3)
        optimizer.step()
    assert weight.tolist() == [0.3125, -0.0009765625, 8.0]
