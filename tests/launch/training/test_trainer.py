"""The trainer's schedule, and the optimizer that can skip."""

import pytest
import torch

from launch.training.config import RunConfig
from launch.training.optimizer import MasterWeights, build_optimizer
from launch.training.trainer import learning_rate
from runtime.optim.formats import UpdateFormats


def test_learning_rate_warms_up_then_follows_its_schedule() -> None:
    cosine = RunConfig(lr=1.0, warmup=10, steps=110, schedule="cosine")
    assert [learning_rate(cosine, step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate(cosine, 10) == 1.0
    assert learning_rate(cosine, 60) == pytest.approx(0.55)
    assert learning_rate(cosine, 110) == pytest.approx(0.1)
    trapezoid = cosine.model_copy(update={"schedule": "trapezoid"})
    assert [learning_rate(trapezoid, step) for step in (10, 50, 88)] == [1.0, 1.0, 1.0]
    assert learning_rate(trapezoid, 99) == pytest.approx(0.55)
    assert learning_rate(trapezoid, 110) == pytest.approx(0.1)
    constant = cosine.model_copy(update={"schedule": "constant"})
    assert {learning_rate(constant, step) for step in range(10, 110)} == {1.0}


def test_skip_leaves_weights_and_moments_alone() -> None:
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(RunConfig(lr=0.1), [weight, bias], UpdateFormats())
    weight.grad, bias.grad = torch.full((2, 2), float("nan")), torch.ones(2)
    optimizer.skip = True
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))
    assert not optimizer.state
    optimizer.skip = False
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert (weight < 1).all()


def test_decay_is_on_matrices_only() -> None:
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(RunConfig(lr=0.1, weight_decay=0.5), [weight, bias], UpdateFormats())
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.equal(weight, torch.full((2, 2), 0.95))
    assert torch.equal(bias, torch.ones(2))


def test_masters_keep_what_bf16_would_lose() -> None:
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = MasterWeights([parameter])
    optimizer = build_optimizer(RunConfig(lr=1e-3, weight_decay=0.0), masters.masters, UpdateFormats())
    for _ in range(8):  # 8 steps of 1e-3; one alone is less than half an ulp of bf16 at 1
        parameter.grad = torch.ones(1, dtype=torch.bfloat16)
        masters.take_gradients()
        optimizer.step()
        masters.give_weights()
    assert parameter.item() == pytest.approx(0.992, abs=0.004)
    assert parameter.item() < 1.0
