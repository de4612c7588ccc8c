"""Sum error: the predicted cost of roundings against emulated sums, whose exact value is that of float64."""

import pytest
import torch
from torch import Tensor

from passes.analysis.sum_error import aligned_bits_for_casts, bits_for_casts, kept_toward_zero
from runtime import gemm
from runtime.numerics import quantize
from runtime.numerics.specs import AccumulateSpec, GemmSpec, QuantSpec


def _operands(n: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(n)
    return torch.randn(48, n, generator=source), torch.randn(n, 48, generator=source)


def _costs(format: str, how: AccumulateSpec, n: int) -> tuple[float, float, float]:
    """Error of the casts and of the sums, over the size of the sums; and the variance that the sums keep."""
    a, b = _operands(n)
    exact = a.double() @ b.double()
    cast = quantize(a, format).double() @ quantize(b, format).double()
    found = gemm(a, b, a_format=format, b_format=format, accumulate=how, seed=3).double()
    size = cast.norm()
    return float((cast - exact).norm() / size), float((found - cast).norm() / size), float(found.var() / cast.var())


def _chosen(format: str, how: str, n: int) -> tuple[int, AccumulateSpec]:
    given = AccumulateSpec.parse(how.replace("M", "auto"))
    bits = bits_for_casts(GemmSpec(QuantSpec(format), QuantSpec(format), given), n)
    return bits, AccumulateSpec.parse(how.replace("M", f"1-8-{bits}"))


@pytest.mark.parametrize("n", [8, 64, 1024])
@pytest.mark.parametrize(
    "how",
    [
        *("M", "M/64", "M rounded", "M per_chunk", "M/32 per_chunk", "M stochastic"),
        *("M toward_zero", "M/64 toward_zero", "M nearest_away", "M/64 nearest_away"),
    ],
)
@pytest.mark.parametrize("format", ["bf16", "e4m3", "e5m2"])
def test_what_is_chosen_costs_no_more_than_the_casts_and_half_of_it_more(format: str, how: str, n: int) -> None:
    bits, chosen = _chosen(format, how, n)
    casts, sums, kept = _costs(format, chosen, n)
    assert sums < 1.1 * casts
    assert kept > 0.9
    if bits > 4:  # three bits less are too few: nothing is given away by more than that
        short = AccumulateSpec.parse(how.replace("M", f"1-8-{bits - 3}"))
        assert _costs(format, short, n)[1] > casts


def test_fp32_operands_keep_fp32_sums() -> None:
    assert bits_for_casts(GemmSpec(accumulator=AccumulateSpec("auto")), 4) == 23


@pytest.mark.parametrize("m", [7, 8, 10])
def test_what_is_kept_toward_zero(m: int) -> None:
    """7 bits of 1024 products of e5m2 keep a fifth, where the theorem for nearest rounding sees no loss."""
    how = AccumulateSpec(f"1-8-{m}", rounding="toward_zero")
    kept = _costs("e5m2", how, 1024)[2]
    assert kept_toward_zero(m, how, 1024) - 0.02 < kept < {7: 0.3, 8: 0.5, 10: 0.9}[m]


@pytest.mark.parametrize("format", ["bf16", "e4m3", "e5m2"])
@pytest.mark.parametrize(("chunk", "n"), [(8, 64), (8, 1024), (32, 1024), (32, 4096)])
def test_what_is_asked_of_an_aligned_sum_costs_about_the_casts(chunk: int, n: int, format: str) -> None:
    """Two bits less cost more than the casts; an accumulator of fewer bits than the terms has is asked for more."""

    def cost(align: int, mantissa: int) -> float:
        how = AccumulateSpec(f"1-8-{mantissa}", chunk, "toward_zero", model="aligned", align=align)
        casts, sums, _ = _costs(format, how, n)
        return sums / casts

    named = AccumulateSpec("fp32", chunk, "toward_zero", model="aligned")
    align, fewer = aligned_bits_for_casts(GemmSpec(QuantSpec(format), QuantSpec(format), named), n)
    assert cost(align, align) < 1.1
    assert cost(align - 2, align - 2) > 2
    assert cost(max(align, fewer) + 3, fewer) < 1.1
