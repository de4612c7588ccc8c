"""Traffic: casts that run and bytes that move, counted by hand on a small program."""

from passes.analysis.traffic import Traffic, traffic
from passes.ir.parser import parse_program
from tests.passes.golden import run
from tests.passes.programs_for_tests import E4M3, convolutions, layer, two_layers

_X, _SMALL, _WEIGHT = 2 * 4 * 8 * 8, 2 * 4 * 4 * 4, 4 * 4 * 3 * 3


def _traffic(text: str, passes: str) -> Traffic:
    return traffic(parse_program(run(text, passes)))


def test_a_net_before_and_after_its_casts() -> None:
    ops = 4 * (_X + _X) + 4 * (_X + _SMALL)  # relu, max-pool
    assert _traffic(convolutions(), "") == Traffic(0, ops)
    casts = (4 + 2) * (_X + _SMALL + 2 * _WEIGHT)
    assert _traffic(convolutions(), "annotate,insert-casts") == Traffic(4, ops + casts)
    moved = (4 + 2) * (_X + _X + 2 * _WEIGHT) + 2 * (_X + _X) + 2 * (_X + _SMALL)
    placed = _traffic(convolutions(), "annotate,insert-casts,place-regions{carriers=drop}")
    assert placed == Traffic(4, moved)
    assert placed.bytes < ops + casts


def test_a_shared_cast_runs_once() -> None:
    text = two_layers(layer(E4M3))
    apart, shared = (_traffic(text, f"annotate,insert-casts{more}") for more in ("", ",share-casts"))
    assert (apart.casts, shared.casts) == (4, 3)
    assert apart.bytes - shared.bytes == (4 + 2) * 8 * 4
