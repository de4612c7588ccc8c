"""make_optimizer: what the policy of a compiled model says of the update, and what it says to those who ask wrongly."""

import pytest
import torch
from torch import nn

from lpcompile import LpError, Policy, lpcompile, make_optimizer
from lpcompile.policy.resolve import Update
from runtime.optim.adamw import LowPrecisionAdamW
from runtime.optim.sgd import LowPrecisionSGD

UPDATE = Update(master="bf16", momentum="e5m2", variance="bf16", rounding="stochastic")


def _model(policy: Policy, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return lpcompile(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype), policy, seed=17)


def test_the_policy_says_the_formats_and_the_model_the_seed() -> None:
    model = _model(Policy(update=UPDATE))
    optimizer = make_optimizer(model, "adamw", lr=0.01, betas=(0.8, 0.9))
    assert isinstance(optimizer, LowPrecisionAdamW)
    assert optimizer.bytes_per_parameter() == 2 + 1 + 2
    group = optimizer.param_groups[0]
    assert (group["seed"], group["lr"], group["betas"]) == (17, 0.01, (0.8, 0.9))
    x, y = torch.randn(64, 8).bfloat16(), torch.ones(64, 1).bfloat16()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_a_policy_that_is_silent_means_fp32() -> None:
    model = _model(Policy(), torch.bfloat16)
    optimizer = make_optimizer(model, "sgd", momentum=0.5)
    assert isinstance(optimizer, LowPrecisionSGD)
    assert optimizer.bytes_per_parameter() == 2 + 4 + 4


def test_a_model_that_was_not_compiled_takes_a_policy() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2, dtype=torch.bfloat16), policy=Policy(update=UPDATE))
    assert (optimizer.bytes_per_parameter(), optimizer.param_groups[0]["seed"]) == (5, 0)


def test_what_quantizers_learn_stays_in_fp32() -> None:
    rule = {"match": {"op": "linear"}, "fwd": {"x": {"format": "uint4", "quantizer": {"kind": "pact"}}, "w": "e4m3"}}
    policy = Policy.model_validate({"rules": [rule], "update": {"master": "bf16", "momentum": "bf16"}})
    optimizer = make_optimizer(_model(policy, torch.float32), "sgd")
    assert [group["master_format"] for group in optimizer.param_groups] == ["bf16", "fp32"]


def test_refuses_with_a_sentence() -> None:
    model = _model(Policy())
    with pytest.raises(LpError, match=r'make_optimizer: "adam" is not an optimizer\. Did you mean "adamw"\?'):
        make_optimizer(model, "adam")  # type: ignore[arg-type]
    with pytest.raises(LpError, match="lpcompile"):
        make_optimizer(nn.Linear(2, 2))
    with pytest.raises(LpError, match="bf16 parameter and its remainder"):
        make_optimizer(_model(Policy(update=Update(master="bf16+16")), torch.float32))
