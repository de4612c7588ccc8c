"""Agreement: the first field in which a rank differs is named, with the rank."""

from typing import Any

import pytest
import torch

from launch.training.agreement import compare
from launch.training.config import ConfigError, RunConfig, flag_of
from launch.training.watch import Watch
from launch.training.world import World
from runtime.errors import LpError
from tests.multiprocess import run_ranks

FIELDS = {flag_of(key): value for key, value in RunConfig().model_dump().items()}


@pytest.mark.parametrize("field", [*FIELDS, "--policy", "--data", "version of torch"])
def test_the_field_and_the_rank_are_named(field: str) -> None:
    of_ranks: list[dict[str, Any]] = [{**FIELDS, field: "this"} for _ in range(3)]
    compare(of_ranks)
    of_ranks[2][field] = "that"
    with pytest.raises(ConfigError) as caught:
        compare(of_ranks)
    assert caught.value.is_of_all_ranks, "rank 0 alone speaks"
    assert str(caught.value).startswith(f"rank 2: {field}: the ranks do not run the same. Expected this, as on rank 0.")


def _together(rank: int, world: int) -> list[str]:
    here = World(rank, world, rank, torch.device("cpu"), 0, Watch())
    told = []
    for failing in ([1], [0, 1], []):
        try:
            with here.together():
                if rank in failing:
                    raise OSError(28, "No space left on device", "somewhere")
        except LpError as error:
            told.append(str(error))
    return told


def test_what_fails_on_one_rank_is_raised_on_all_and_names_it() -> None:
    told = run_ranks(_together, 2)
    assert told[0] == told[1]
    assert [each.partition(". Try")[0] for each in told[0]] == [
        "rank 1: somewhere: the disk is full. Got No space left on device",
        "somewhere: the disk is full. Got No space left on device",
    ]
