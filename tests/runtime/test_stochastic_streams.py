"""Stochastic gradient casts on W ranks and over micro-batches: independent errors, whose mean has 1/W of the variance;
and the same (rank, micro-batch) draws the same bits.
"""

import itertools

import pytest
import torch
from torch import Tensor

from runtime.numerics.specs import QuantSpec
from runtime.ops.layer import cast
from runtime.state import RunState

SPEC = QuantSpec("e2m1", "stochastic")
SITE, SLOT, COUNT = 3, 4, 20_000


def gradient() -> Tensor:
    """The same on every rank, so that only the random bits differ."""
    return torch.rand(COUNT, generator=torch.Generator().manual_seed(0)) * 6


def errors(dy: Tensor, spec: QuantSpec = SPEC, ranks: int = 8, micro_batches: int = 4, step: int = 0) -> Tensor:
    """Rounding errors (ranks, micro_batches, elements), each of a state of its own as a process would have."""
    states = [RunState(seed=11, rank=r, micro_batch=m, step=step) for r in range(ranks) for m in range(micro_batches)]
    return torch.stack([_error(dy, spec, state) for state in states]).view(ranks, micro_batches, -1)


def _error(dy: Tensor, spec: QuantSpec, state: RunState) -> Tensor:
    return cast(dy, spec, state, SITE, SLOT).grid.double() - dy.double()


@pytest.mark.parametrize("spec", [SPEC, QuantSpec("int4", "stochastic")])
def test_the_averaged_error_has_one_wth_of_the_variance(spec: QuantSpec) -> None:
    """The mean square over COUNT elements of bounded errors has a relative deviation below sqrt(2 / COUNT) = 1%: a
    tolerance of 5 such. Shared bits would leave the ratio at 1.
    """
    each = errors(gradient(), spec).flatten(0, 1)
    single = each.square().mean()
    assert single > 0
    for count in (2, 4, 8, 32):
        ratio = each[:count].mean(0).square().mean() / single * count
        assert abs(float(ratio) - 1) < 5 * (2 / COUNT) ** 0.5


def test_the_error_is_zero_in_the_mean_and_uncorrelated_between_any_two() -> None:
    each = errors(gradient(), ranks=4, micro_batches=3).flatten(0, 1)
    deviation = float(each.square().mean().sqrt())
    assert abs(float(each.mean())) < 5 * deviation / each.numel() ** 0.5
    for a, b in itertools.combinations(each, 2):
        correlation = float((a * b).mean()) / deviation**2
        assert abs(correlation) < 5 / COUNT**0.5


def test_steps_sites_and_operands_draw_other_bits_too() -> None:
    dy = gradient()
    states = [RunState(seed=11), RunState(seed=11, step=1), RunState(seed=12)]
    draws = [cast(dy, SPEC, state, SITE, SLOT).grid for state in states]
    draws += [cast(dy, SPEC, states[0], *place).grid for place in ((SITE + 1, SLOT), (SITE, SLOT + 1))]
    for a, b in itertools.combinations(draws, 2):
        assert not torch.equal(a, b)


def test_the_same_rank_and_micro_batch_repeat_their_bits() -> None:
    dy = gradient()
    assert torch.equal(errors(dy), errors(dy))
    assert not torch.equal(errors(dy), errors(dy, step=1))
