"""The loss scale against torch.amp.GradScaler's rule."""

import random

import pytest
import torch

from runtime.errors import NotSupported
from runtime.optim.loss_scale import LossScale


def test_none_and_static_never_move() -> None:
    for kind, value in (("none", 1.0), ("static", 1024.0)):
        scale = LossScale(kind, init=1024.0, interval=1)  # type: ignore[arg-type]
        for overflow in (True, False, True, False):
            scale.update(overflow)
        assert scale.value == value
        assert scale.skipped == 2


def test_backs_off_on_overflow_and_stops_at_the_minimum() -> None:
    scale = LossScale("dynamic", init=8.0, minimum=2.0)
    seen = []
    for _ in range(4):
        scale.update(True)
        seen.append(scale.value)
    assert seen == [4.0, 2.0, 2.0, 2.0]


def test_grows_only_after_an_interval_without_overflow() -> None:
    scale = LossScale("dynamic", init=4.0, interval=3)
    for overflow in (False, False, True, False, False):
        scale.update(overflow)
    assert scale.value == 2.0
    scale.update(False)
    assert scale.value == 4.0


def test_growth_stays_a_finite_fp32() -> None:
    scale = LossScale("dynamic", init=2.0**127, interval=1)
    scale.update(False)
    assert scale.value == 2.0**127


def test_equals_grad_scaler_on_a_random_history() -> None:
    ours = LossScale("dynamic", init=2.0**10, interval=5, minimum=2.0**-20)
    value, tracker = torch.tensor(2.0**10), torch.tensor(0, dtype=torch.int32)
    random.seed(0)
    for _ in range(300):
        overflow = random.random() < 0.12
        ours.update(overflow)
        torch._amp_update_scale_(value, tracker, torch.tensor(float(overflow)), 2.0, 0.5, 5)
        assert ours.value == value.item()


def test_state_dict_continues_where_it_stopped() -> None:
    history = [False, True, False, False, False, True, False, False, False]
    whole = LossScale("dynamic", init=256.0, interval=2)
    first = LossScale("dynamic", init=256.0, interval=2)
    for overflow in history:
        whole.update(overflow)
    for overflow in history[:4]:
        first.update(overflow)
    second = LossScale("dynamic", init=2.0, interval=2)
    second.load_state_dict(first.state_dict())
    for overflow in history[4:]:
        second.update(overflow)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("bad", [1000.0, 0.0, -2.0, float("inf")])
def test_refuses_what_is_not_a_power_of_two(bad: float) -> None:
    with pytest.raises(NotSupported, match="power of two"):
        LossScale("dynamic", init=bad)
