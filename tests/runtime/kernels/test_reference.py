"""The reference GEMM against fractions.Fraction, rounding c + a b once after every add."""

from fractions import Fraction

import pytest
import torch

from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from runtime.numerics.reference_gemm import add_to_odd, multiply
from runtime.numerics.specs import AccumulateSpec, GemmSpec


def _round(x: Fraction, row: FloatFormat) -> Fraction:
    """x on the grid of a format, by integers: nearest, ties to even or away, saturating."""
    if x == 0:
        return x
    magnitude, exponent = abs(x), 0
    while magnitude >= 2 ** (exponent + 1):
        exponent += 1
    while magnitude < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, row.emin) - row.mantissa)
    if not row.subnormals and magnitude < Fraction(row.tiny):
        ulp = Fraction(row.tiny)
    whole, rest = divmod(magnitude, ulp)
    up = 2 * rest > ulp or (2 * rest == ulp and (row.rounding == "nearest_away" or whole % 2 == 1))
    rounded = min((whole + up) * ulp, Fraction(row.max))
    return rounded if x > 0 else -rounded


def _exact(a: torch.Tensor, b: torch.Tensor, spec: GemmSpec) -> torch.Tensor:
    row = get_format(spec.accumulate)
    assert isinstance(row, FloatFormat)
    chunk = spec.chunk or max(a.shape[1], 1)
    out = torch.zeros(a.shape[0], b.shape[1])
    for m in range(a.shape[0]):
        for n in range(b.shape[1]):
            total = Fraction(0)
            for start in range(0, a.shape[1], chunk):
                part = Fraction(0)
                for k in range(start, min(start + chunk, a.shape[1])):
                    part = _round(part + Fraction(a[m, k].item()) * Fraction(b[k, n].item()), row)
                total = part if a.shape[1] <= chunk else _round(total + part, row)
            out[m, n] = float(total)
    return out


@pytest.mark.parametrize("accumulate", ["fp32", "dlfloat16", "1-6-9", "fp16", "bf16", "e5m2"])
@pytest.mark.parametrize(("num_k", "chunk"), [(0, None), (1, None), (33, None), (33, 8), (33, 1), (32, 32)])
def test_rounds_after_every_add(accumulate: str, num_k: int, chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(num_k)
    a = torch.randn(3, num_k, generator=generator).bfloat16().float() * 8
    b = torch.randn(num_k, 2, generator=generator).bfloat16().float()
    spec = GemmSpec(accumulator=AccumulateSpec(accumulate, chunk))
    assert torch.equal(multiply(a, b, spec), _exact(a, b, spec))


def test_fused_multiply_add_rounds_once() -> None:
    """design.md section 3: through fp32 the sum would be rounded twice and end at 1.001953125."""
    a = torch.tensor([[1.0, 1 + 2.0**-9]])
    b = torch.tensor([[1.0], [(1 + 510 / 512) * 2.0**-11]])
    assert multiply(a, b, GemmSpec(accumulator=AccumulateSpec("dlfloat16"))).item() == 1.0


def test_swamping_and_its_cure() -> None:
    """4096 ones in 10 significant bits, nearest even: 1024 in one chunk, 4096 in chunks of 64 (algorithms A3)."""
    ones = torch.ones(1, 4096)
    assert multiply(ones, ones.t(), GemmSpec(accumulator=AccumulateSpec("1-6-9"))).item() == 1024
    assert multiply(ones, ones.t(), GemmSpec(accumulator=AccumulateSpec("1-6-9", 64))).item() == 4096


def test_sum_to_odd_keeps_the_sticky_bit() -> None:
    x = torch.tensor([1.0, 1.0, -1.0, 1.0, float("inf"), float("nan")], dtype=torch.float64)
    y = torch.tensor([2.0**-80, -(2.0**-80), 2.0**-80, 1.0, 1.0, 1.0], dtype=torch.float64)
    s = add_to_odd(x, y)
    assert s[0] == 1 + 2.0**-52
    assert s[1] == 1 - 2.0**-53
    assert s[2] == -(1 - 2.0**-53)
    assert s[3] == 2
    assert s[4] == float("inf")
    assert s[5].isnan()
