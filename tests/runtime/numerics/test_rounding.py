"""Rounding: every mode against exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.errors import FormatError
from runtime.numerics.rounding import round_to_integer

magnitudes = st.one_of(
    st.floats(0, 2.0**54), st.floats(0, 8), st.integers(0, 4000).map(lambda n: n / 8), st.floats(0, 2.0**-1000)
)


@settings(max_examples=400, deadline=None)
@given(magnitudes, st.integers(0, 2**32 - 1))
@example(0.49999999999999994, 0)  # + 0.5 is 1.0 in float64
@example(4503599627370497.5, 0)
def test_equals_exact_arithmetic(t: float, word: int) -> None:
    exact, below = Fraction(t), math.floor(t)
    rest = exact - below
    expected = {
        "nearest_even": round(exact),
        "nearest_away": below + (rest >= Fraction(1, 2)),
        "toward_zero": below,
        "stochastic": below + (rest + Fraction(word, 2**32) >= 1),
    }
    u = torch.tensor([word * 2.0**-32], dtype=torch.float64)
    got = {mode: int(round_to_integer(torch.tensor([t], dtype=torch.float64), mode, u)) for mode in expected}
    assert got == expected


def test_stochastic_on_the_bits_of_1_3_with_three_fraction_bits() -> None:
    """Appendix A1 of the algorithm notes: 0x3FA66666 has 419430 / 2^20 below the kept bits, so up iff r >= 629146."""
    t = torch.full((2,), torch.tensor(1.3).double().item() * 8, dtype=torch.float64)
    u = torch.tensor([629145, 629146], dtype=torch.float64) * 2.0**-20
    assert round_to_integer(t, "stochastic", u).tolist() == [10, 11]


def test_inf_and_nan_pass_and_stochastic_needs_numbers() -> None:
    t = torch.tensor([math.inf, math.nan], dtype=torch.float64)
    for mode in ("nearest_even", "nearest_away", "toward_zero"):
        inf, nan = round_to_integer(t, mode).tolist()
        assert math.isinf(inf)
        assert math.isnan(nan)
    with pytest.raises(FormatError, match="no random numbers"):
        round_to_integer(t, "stochastic")
