"""Paired differences, against scipy's own test; the effect that can be seen, by simulation; verdicts."""

import math

import pytest
import torch

from launch.reproduction.statistics import Difference, paired, verdict

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    ours, theirs = torch.randn(2, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    found = paired(ours, theirs)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.mean == pytest.approx(sum(one - two for one, two in zip(ours, theirs)) / 11)


def test_the_visible_effect_is_seen_four_times_of_five() -> None:
    generator, count = torch.Generator().manual_seed(1), 10
    visible = paired(torch.randn(10000, dtype=torch.float64, generator=generator).tolist(), [0.0] * 10000).visible
    of_ten = (stats.t.ppf(0.975, 9) + stats.t.ppf(0.8, 9)) / math.sqrt(count)  # deviation 1
    assert visible == pytest.approx((1.96 + 0.8416) / 100, rel=0.03)
    x = torch.randn(20000, count, dtype=torch.float64, generator=generator) + of_ten
    t = x.mean(1) / (x.std(1) / math.sqrt(count))
    assert float((t.abs() > stats.t.ppf(0.975, 9)).double().mean()) == pytest.approx(0.8, abs=0.02)


def test_too_few_pairs_come_to_nothing() -> None:
    assert math.isnan(paired([], []).mean)
    one = paired([3.0], [1.0])
    assert (one.mean, one.low, one.high) == (2.0, -math.inf, math.inf)
    assert verdict(one, 0.0, math.inf) == "inconclusive"


@pytest.mark.parametrize(
    ("low", "high", "away", "expected"),
    [
        (-0.5, math.inf, False, "reproduced"),  # all of [-0.2, 0.4] above -0.5
        (-0.1, math.inf, False, "inconclusive"),
        (0.5, math.inf, False, "contradicted"),
        (-math.inf, -0.3, True, "contradicted"),
        (0.0, math.inf, True, "inconclusive"),  # the mean is above 0, and 0 is in the interval
        (-math.inf, 0.0, True, "inconclusive"),
    ],
)
def test_verdicts(low: float, high: float, away: bool, expected: str) -> None:
    assert verdict(Difference(5, 0.1, -0.2, 0.4, 0.4), low, high, away) == expected


def test_a_claim_away_from_zero_needs_the_mean_inside_and_zero_outside() -> None:
    behind = Difference(5, -1.2, -1.5, -0.9, 0.4)
    assert verdict(behind, -3.0, -1.0, True) == "reproduced"
    assert verdict(behind, -3.0, -1.0) == "inconclusive"
    assert verdict(behind, -3.0, -1.4, True) == "inconclusive"
