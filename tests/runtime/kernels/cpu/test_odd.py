"""float64 rounded to odd in fp32: against exact arithmetic, and block casts of float64 against the oracle."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from runtime.kernels.cast import block_values
from runtime.kernels.cpu.odd import odd_in_fp32
from runtime.numerics import quantize
from runtime.numerics.block_casts import quantize_blocks
from tests.machine_facts import needs_kernels

MX = ["mxfp8", "mxfp8-e5m2", "mxfp6", "mxfp6-e3m2", "mxfp4", "mxint8"]


def _values(exponents: tuple[int, int], count: int = 4096) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = torch.randn(count, dtype=torch.float64, generator=generator)
    low, high = exponents
    return torch.ldexp(
        size, torch.randint(low, high + 1, (count // 32, 1), generator=generator).expand(-1, 32).flatten()
    )


@needs_kernels
@pytest.mark.parametrize("exponents", [(-3, 3), (-160, -120), (100, 123)])
def test_odd_is_toward_zero_with_a_sticky_bit(exponents: tuple[int, int]) -> None:
    x = torch.cat([_values(exponents, 512), torch.tensor([0.0, -0.0, 1.0, 2.0**-149, -(2.0**-300)]).double()])
    x = torch.cat([x, x.float().double()])
    found = odd_in_fp32(x)
    assert found is not None
    for value, got in zip(x.tolist(), found.tolist()):
        if Fraction(got) == Fraction(value):
            assert math.copysign(1, got) == math.copysign(1, value)
            continue
        bits = int(torch.tensor(got).view(torch.int32)) & 0x7FFFFFFF
        below = float(torch.tensor(bits - 1, dtype=torch.int32).view(torch.float32))
        above = float(torch.tensor(bits + 1, dtype=torch.int32).view(torch.float32))
        assert bits % 2 == 1
        assert below < abs(value) < above


@needs_kernels
def test_what_is_no_number_passes_and_what_is_large_declines() -> None:
    found = odd_in_fp32(torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=torch.float64))
    assert found is not None
    assert found.isnan().tolist() == [True, False, False, False]
    assert found[1:].tolist() == [math.inf, -math.inf, 1.0]
    assert odd_in_fp32(torch.tensor([2.0**126], dtype=torch.float64)) is None
    assert odd_in_fp32(torch.tensor([2.0**1000], dtype=torch.float64)) is None


def _hard() -> Tensor:
    """Ties of every grid, a bit of float64 beside them, and blocks at the ends of the range."""
    plain = torch.cat([_values((-3, 3)), _values((-170, -110)), _values((90, 125)), _values((-1000, 1000))])
    ties = torch.arange(-300, 301, dtype=torch.float64) / 64
    near = torch.cat([ties, ties * (1 + 2.0**-50), ties * (1 - 2.0**-50)])
    near = torch.cat([near * 2.0**e for e in (0, -20, -125, -140, 100)])
    special = near[:256].clone()
    special[3], special[70], special[140] = math.nan, math.inf, -0.0
    return torch.cat([plain, near, special])


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero", "stochastic"])
@pytest.mark.parametrize("row", [*MX, "mxfp4:scale=rceil", "mxfp8:scale=ceil", "mxint8:scale=even"])
def test_block_casts_of_float64_are_the_oracles(row: str, rounding: str) -> None:
    for x in (_hard(), *_hard()[:16384].chunk(4), _hard()[4096:8176].reshape(-1, 40)):
        found = quantize(x, row, rounding=rounding, seed=3)  # type: ignore[arg-type]
        wanted = quantize_blocks(x, row, rounding, seed=3)  # type: ignore[arg-type]
        assert torch.equal(found.view(torch.int64) * ~found.isnan(), wanted.view(torch.int64) * ~wanted.isnan())
        assert torch.equal(found.isnan(), wanted.isnan())


@needs_kernels
def test_float64_takes_the_pass_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(*_: object) -> Tensor:
        raise AssertionError("the oracle's steps in pieces")

    monkeypatch.setattr(block_values, "_in_pieces", pieces)
    x = _values((-3, 3)).view(64, 64)
    assert quantize(x, "mxfp8").dtype == torch.float64
    assert quantize(x.t(), "mxfp4").shape == (64, 64)
