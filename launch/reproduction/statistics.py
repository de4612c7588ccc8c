"""Statistics: paired differences, their interval, and what a claim comes to.

    d_i = ours_i - theirs_i of seed i      mean(d) +- t(0.975, n - 1) s / sqrt n
    the smallest effect that would have been seen, four times of five: (t(0.975, n - 1) + t(0.8, n - 1)) s / sqrt n

No correction for the number of comparisons: of twenty true zeros one interval misses zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduced", "contradicted", "inconclusive"]


@dataclass(frozen=True)
class Difference:
    """Of paired runs. NaN where there are too few."""

    count: int
    mean: float
    low: float
    high: float
    visible: float  # the smallest effect that would have been seen


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The difference of pairs. Pairs of which one is not finite are the caller's to leave out."""
    from scipy import stats  # here: the import takes a second

    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    count = len(differences)
    if count == 0:
        return Difference(0, *(4 * [math.nan]))
    mean = sum(differences) / count
    if count < 2:
        return Difference(count, mean, -math.inf, math.inf, math.inf)
    error = math.sqrt(sum((each - mean) ** 2 for each in differences) / (count - 1) / count)
    half = float(stats.t.ppf(0.975, count - 1)) * error
    return Difference(count, mean, mean - half, mean + half, half + float(stats.t.ppf(0.8, count - 1)) * error)


def verdict(difference: Difference, low: float, high: float, is_away_from_zero: bool = False) -> Verdict:
    """What the claim that the difference lies in [low, high] comes to.

    contradicted: the whole 95% interval lies outside. reproduced: the whole interval lies inside; of a claim
    `is_away_from_zero` the mean inside and zero outside of the interval, which need not be as narrow as the claim.
    """
    if difference.count < 2 or math.isnan(difference.mean):
        return "inconclusive"
    if difference.high < low or difference.low > high:
        return "contradicted"
    if is_away_from_zero:
        is_zero_out = difference.low > 0 or difference.high < 0
        return "reproduced" if low <= difference.mean <= high and is_zero_out else "inconclusive"
    return "reproduced" if low <= difference.low and difference.high <= high else "inconclusive"
