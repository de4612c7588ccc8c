"""Running statistics of batch norms: averaged over the ranks after a step, and untouched by one that is skipped."""

from typing import Any

import torch
from torch import nn

from launch.training.running_statistics import RunningStatistics
from launch.training.watch import Watch
from launch.training.world import World
from tests.multiprocess import run_ranks


def _here(rank: int, world: int) -> World:
    return World(rank, world, rank, torch.device("cpu"), 0, Watch(rank, world))


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))


def _pictures(rank: int) -> torch.Tensor:
    return torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(rank)) * (1 + rank)


def _after_a_step(rank: int, world: int, skip: bool) -> list[Any]:
    model = _model()
    statistics = RunningStatistics(model, _here(rank, world))
    statistics.keep()
    model(_pictures(rank))
    statistics.agree(skip)
    return [each.tolist() for each in model.buffers()]


def test_the_mean_of_the_ranks() -> None:
    found = run_ranks(_after_a_step, 2, False)
    alone = []
    for rank in range(2):
        model = _model()
        model(_pictures(rank))
        alone.append(list(model.buffers()))
    assert found[0] == found[1], "the same on all ranks"
    for mean, one, other in zip(found[0], *alone):
        first = torch.tensor(mean)
        if first.is_floating_point():
            assert not torch.equal(one, other)
            torch.testing.assert_close(first, (one + other) / 2)
        else:
            assert int(first) == 1


def test_a_skipped_step_leaves_them() -> None:
    for found in run_ranks(_after_a_step, 2, True):
        assert found == [each.tolist() for each in _model().buffers()]


def test_a_model_without_batch_norm_has_nothing_to_agree_on() -> None:
    statistics = RunningStatistics(nn.Linear(2, 2), _here(0, 2))  # would fail without a process group
    statistics.keep()
    statistics.agree(skip=False)
    statistics.agree(skip=True)
