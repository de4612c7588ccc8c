"""The minimum cut against every assignment of places to small random problems."""

from itertools import product
from math import inf
from random import Random

import pytest

from passes.analysis.regions import Place, Value, bytes_moved, place


def _random_problem(seed: int) -> list[Value]:
    """Up to six values; some asked for in both forms, some that cannot run on grid values, some that cost nothing."""
    random = Random(seed)
    values: list[Value] = []
    for number in range(random.randint(1, 6)):
        inputs = tuple(sorted(random.sample(range(number), random.randint(0, min(2, number)))))
        is_run_on_grid = bool(inputs) and random.random() < 0.7
        values.append(
            Value(
                inputs=inputs,
                high=random.choice((0, random.randint(1, 40))),
                low=random.choice((0, random.randint(1, 20))) if is_run_on_grid else None,
                cast=random.choice((0, random.randint(1, 40))),
                needs_high=not inputs or random.random() < 0.3,
                needs_low=random.random() < 0.4,
            )
        )
    return values


def _is_allowed(values: list[Value], places: tuple[Place, ...]) -> bool:
    """The rules, said once more: an operation runs where its operands are."""
    for value, where in zip(values, places):
        has_high, has_low = where is not Place.LOW, where is not Place.HIGH
        is_run_on_grid = where in (Place.BOTH_RUN, Place.LOW)
        if (value.needs_high and not has_high) or (value.needs_low and not has_low):
            return False
        if has_high and any(places[each] is Place.LOW for each in value.inputs):
            return False
        if is_run_on_grid and (value.low is None or any(places[each] is Place.HIGH for each in value.inputs)):
            return False
    return True


def _cost(values: list[Value], places: tuple[Place, ...]) -> float:
    total = 0
    for value, where in zip(values, places):
        total += 0 if where is Place.LOW else value.high
        total += value.cast if where is Place.BOTH_CAST else 0
        total += value.low or 0 if where in (Place.BOTH_RUN, Place.LOW) else 0
    return total


@pytest.mark.parametrize("seed", range(60))
def test_the_cut_is_the_cheapest_of_all_assignments(seed: int) -> None:
    values = _random_problem(seed)
    costs = [_cost(values, places) for places in product(Place, repeat=len(values)) if _is_allowed(values, places)]
    found = place(values)
    assert _is_allowed(values, tuple(found))
    assert bytes_moved(values, found) == _cost(values, tuple(found)) == min(costs)


@pytest.mark.parametrize("seed", range(20))
def test_what_breaks_a_rule_costs_infinitely_much(seed: int) -> None:
    values = _random_problem(seed)[:4]
    for places in product(Place, repeat=len(values)):
        assert (bytes_moved(values, places) < inf) == _is_allowed(values, places), places


def test_a_cast_below_a_relu_moves_above_it_where_nothing_keeps_the_relu() -> None:
    x = Value((), high=0, low=None, cast=6, needs_high=True)
    relu = Value((0,), high=8, low=4, cast=6, needs_low=True)
    assert place([x, relu]) == [Place.BOTH_CAST, Place.LOW]
    carrier = Value((0,), high=8, low=4, cast=6, needs_high=True, needs_low=True)
    assert place([x, carrier]) == [Place.HIGH, Place.BOTH_CAST]


def test_three_views_of_one_tensor_are_cast_once() -> None:
    x = Value((), high=0, low=None, cast=6, needs_high=True)
    view = Value((0,), high=0, low=0, cast=6, needs_high=True, needs_low=True)
    assert place([x, view, view, view]) == [Place.BOTH_CAST, *[Place.BOTH_RUN] * 3]
    assert place([x, view]) == [Place.HIGH, Place.BOTH_CAST], "as cheap is no reason to move"
