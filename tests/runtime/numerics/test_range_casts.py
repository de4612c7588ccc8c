"""Range casts, FQT's PTQ, PSQ and BHQ: against a dense definition, their bounds, and what no range holds."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.errors import FormatError, NotSupported
from runtime.kernels.cast.grid import fast_to_grid
from runtime.numerics import get_format, quantize
from runtime.numerics.casts import to_grid
from runtime.numerics.range_casts import _groups
from runtime.numerics.range_formats import get_range_format
from runtime.numerics.specs import QuantSpec

KINDS = ("ptq", "psq", "bhq")


def _uneven(rows: int = 8, columns: int = 64, factor: float = 100.0) -> Tensor:
    """Gradients of which one sample is much larger."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[rows // 2] *= factor
    return x


def _dense(x: np.ndarray) -> np.ndarray:
    """T of reference/algorithms.md 4.4, as a matrix over samples in their own order."""
    ranges = x.max(1) - x.min(1)
    order = np.argsort(-ranges, kind="stable")
    v, size = ranges[order], len(ranges)
    others, total = 0, v.sum()
    while True:
        others += 1
        total -= v[size - others]
        if others * v[size - others - 1] > total or others == size - 1:
            break
    leaders = size - others
    counts = np.round(np.cumsum(others * v[:leaders] / v[:leaders].sum())).astype(int)
    t, begin = np.zeros((size, size)), leaders
    for i in range(leaders):
        members = [i, *range(begin, leaders + counts[i])]
        m = len(members)
        u = np.full(m, 1 / math.sqrt(m))
        u[0] -= 1
        u /= np.linalg.norm(u)
        q = np.eye(m) - 2 * np.outer(u, u)
        w1, w2 = v[i] / math.sqrt(m), v[begin] * np.abs(q).max()
        s = np.array([w1 ** (-1 / 3), *[(w2 / (m - 1)) ** (-1 / 3)] * (m - 1)])
        s *= math.sqrt(1 / s[0] ** 2 + 1 / s[1] ** 2)
        rows = order[members]
        t[np.ix_(rows, rows)] = q @ np.diag(s)
        begin = leaders + counts[i]
    return t


def _nearest_per_sample(x: np.ndarray, bits: int) -> np.ndarray:
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    return np.round((x - low) / step) * step + low


def test_hand_vector() -> None:
    """Four samples of ranges 9, 1, 1, 1 are one group: s = (1.05409, 3.16228) and Q of halves (4.5)."""
    x = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    groups = _groups(x)
    assert groups is not None
    mixed = groups.mix(torch.eye(4, dtype=torch.float64))
    half = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
    np.testing.assert_allclose(np.abs(mixed), np.abs(half @ np.diag([1.05409, *[3.16228] * 3])), atol=1e-5)
    np.testing.assert_allclose(groups.unmix(mixed), np.eye(4), atol=1e-12)


@pytest.mark.parametrize("rows", [2, 3, 5, 8, 33])
def test_mixing_is_the_dense_matrix(rows: int) -> None:
    x = torch.randn(rows, 20, generator=torch.Generator().manual_seed(rows)).double()
    x *= torch.logspace(-2, 3, rows)[torch.randperm(rows, generator=torch.Generator().manual_seed(1)), None]
    groups, t = _groups(x), _dense(x.numpy())
    assert groups is not None
    np.testing.assert_allclose(groups.mix(x), t @ x.numpy(), rtol=1e-9, atol=1e-9)
    wanted = np.linalg.inv(t) @ _nearest_per_sample(t @ x.numpy(), 5)
    np.testing.assert_allclose(quantize(x, "bhq5"), wanted, rtol=1e-9, atol=1e-9)


def test_nearest_by_hand() -> None:
    x = torch.tensor([[-1.0, 0.0, 0.4, 3.0], [5.0, 5.0, 5.0, 5.0]])
    assert quantize(x[:1], "ptq2").tolist() == [[-1.5, 0.0, 0.0, 3.0]]  # floor(1 * 3 / 4) is 0: z is 1, s = 3 / 2
    assert quantize(x, "psq2")[0].tolist() == pytest.approx([-1.0, 1 / 3, 1 / 3, 3.0])
    assert quantize(x, "psq2")[1].tolist() == [5.0] * 4
    assert quantize(x.abs(), "ptq8")[1].tolist() == [5.0] * 4
    assert quantize(x[0], "psq2").tolist() == quantize(x[:1], "psq2")[0].tolist()  # a vector is one sample


@pytest.mark.parametrize("low", [0.0, -1e-6, -1.0])
def test_zero_is_exact_per_tensor(low: float) -> None:
    x = torch.tensor([low, 0.0, 0.3, 1.0])
    for bits in range(2, 9):
        assert quantize(x, f"ptq{bits}", "stochastic", seed=bits)[1] == 0.0
        assert float((quantize(x, f"ptq{bits}") - x).abs().max()) <= 1.01 / (2**bits - 2)


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_is_unbiased_and_within_its_bound(kind: str) -> None:
    x, bits, count = _uneven(), 4, 1500
    total, squares = torch.zeros(x.shape, dtype=torch.float64), 0.0
    for step in range(count):
        q = quantize(x, f"{kind}{bits}", "stochastic", seed=7, step=step).double()
        total += q
        squares += float((q - x).square().sum())
    variance = squares / count
    bias = total / count - x
    assert float(bias.norm()) < 1.25 * math.sqrt(variance / count)  # norms of N D numbers have little spread
    steps, (n, d) = 2**bits - 1, x.shape
    ranges = (x.amax(1) - x.amin(1)).double()
    m, l1, l2 = n, float(ranges.max()), float(ranges.sort(descending=True).values[1])
    bounds = {
        "ptq": n * d * float(x.max() - x.min()) ** 2 * (steps / (steps - 1)) ** 2 / (4 * steps**2),
        "psq": d / (4 * steps**2) * float(ranges.square().sum()),
        "bhq": d / (4 * steps**2) * (l1 ** (2 / 3) * m ** (-1 / 3) + l2 ** (2 / 3) * (m - 1) ** (1 / 3)) ** 3,
    }
    assert variance < bounds[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_is_worth_a_factor(kind: str) -> None:
    """Variance goes by the square of the step: ((2^b - 1) / (2^(b - 1) - 1))^2 a bit, about 4."""
    x = torch.rand(16, 4096, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, 0.5, 16)[:, None]
    errors = {
        bits: sum(
            float((quantize(x, f"{kind}{bits}", "stochastic", seed=s).double() - x).square().sum()) for s in range(4)
        )
        for bits in range(4, 9)
    }
    for bits in range(5, 9):
        wanted = ((2**bits - 1) / (2 ** (bits - 1) - 1)) ** 2
        assert errors[bits - 1] / errors[bits] == pytest.approx(wanted, rel=0.1)


def test_mixing_helps_where_samples_differ() -> None:
    x = _uneven()

    def error(name: str) -> float:
        return sum(float((quantize(x, name, "stochastic", seed=s) - x).square().sum()) for s in range(40))

    assert error("bhq4") < error("psq4") / 2 < error("ptq4") / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_kernel_is_the_oracle(dtype: torch.dtype, kind: str, rounding: str) -> None:
    spec = QuantSpec(f"{kind}5", rounding)  # type: ignore[arg-type]
    for shape in ((4, 33), (3, 5, 7), (9,), (2, 3, 4, 5), (0, 4), ()):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = fast_to_grid(x, spec, None, seed=3, step=2, stream=1)
        wanted = to_grid(x, spec, None, seed=3, step=2, stream=1)
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_spreads_over_its_range(kind: str, bad: float) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    x[1, 2] = bad
    got = quantize(x, f"{kind}4", "stochastic")
    assert bool(got[1].isnan().all())
    if kind == "ptq":
        assert bool(got.isnan().all())


def test_names_and_refusals() -> None:
    assert get_range_format("psq5").steps == 31
    for name in ("psq1", "psq9", "bhq16"):
        with pytest.raises(FormatError, match="is not a range format"):
            QuantSpec(name)
    with pytest.raises(NotSupported, match="range format"):
        get_format("psq5")
    with pytest.raises(FormatError, match="makes its own scales"):
        quantize(torch.ones(2), "psq5", scale=2.0)
    with pytest.raises(FormatError, match="makes its own scales"):
        QuantSpec.parse("psq5 stochastic row/amax")
    assert str(QuantSpec.parse("bhq5 stochastic")) == "bhq5 stochastic"
