"""VRR: how much of the variance of a sum of n products survives an accumulator of m_acc mantissa bits.

Sakr et al., "Accumulation Bit-Width Scaling For Ultra-Low Precision Training Of Deep Networks", ICLR 2019, theorem 1.
The products are independent, of mean 0 and variance 1, with m_p mantissa bits; s_i, the sum of the first i, is normal
with variance i. In an accumulator that keeps m_acc bits

    |s_i| > 2^m_acc                            a product is lost whole                       (full swamping)
    2^(m_acc - m_p + j - 1) < |s_i|            its j low bits are lost, j = 1 ... m_p        (partial swamping)

Notation: 2Q(x) = erfc(x / sqrt 2), and 1 - 2Q(x) = erf(x / sqrt 2).
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from runtime.errors import FormatError


@lru_cache(maxsize=4096)
def vrr(m_acc: int, m_p: int, n: int, chunk: int | None = None, nonzero: float = 1.0) -> float:
    """Var(s_n) as the accumulator keeps it, over Var(s_n): in (0, 1], 1 where nothing is lost.

    m_acc, m_p: mantissa bits of accumulator and products, the leading one not counted. n: products in the sum. chunk:
    products of a partial sum (None or 1, or n and above: no chunks), as in corollary 1: VRR(m_acc, m_p, n1) times
    VRR(m_acc, min(m_acc, m_p + log2 n1), n2) of n2 = ceil(n / chunk) partial sums. nonzero: share of the products that
    are not 0, which shortens n, or n1. Counts that are no integers are rounded. The theorem speaks of nearest rounding:
    a sum rounded toward zero keeps much less. Raises FormatError where a count is not positive.
    """
    return math.prod(_retention(m_acc, *level) for level in _levels(m_acc, m_p, n, chunk, nonzero))


def log_loss(m_acc: int, m_p: int, n: int, chunk: int | None = None, nonzero: float = 1.0) -> float:
    """ln v(n) = n (1 - VRR); a sum is fit for training below ln 50 (section 4.4). Of chunks, the larger of two levels.

    Each level with its own length, and not the whole n on the product of both: that reading agrees with the paper's
    table of chunked accumulators and with simulation (see the tests); the other asks for 2 to 4 bits more.
    """
    return max(n * (1 - _retention(m_acc, m_p, n)) for m_p, n in _levels(m_acc, m_p, n, chunk, nonzero))


MAX_LOG_LOSS = math.log(50)
"""v(n) < 50, the paper's threshold."""


@lru_cache(maxsize=4096)
def min_accumulator(m_p: int, n: int, chunk: int | None = None, nonzero: float = 1.0) -> int:
    """The fewest mantissa bits m_acc >= 1 with v(n) < 50, and so with every m_acc above.

    From above, because there the theorem's sum has few terms.
    """
    m_acc = _MOST_BITS
    while m_acc > 1 and log_loss(m_acc - 1, m_p, n, chunk, nonzero) < MAX_LOG_LOSS:
        m_acc -= 1
    return m_acc


_MOST_BITS = 53
_TERMS_AT_ONCE = 1 << 20


def _levels(m_acc: int, m_p: int, n: int, chunk: int | None, nonzero: float) -> list[tuple[int, int]]:
    """(m_p, n) of every sum there is: the one sum, or those within chunks and the one over them."""
    if min(m_acc, n, 1 if chunk is None else chunk) < 1 or m_p < 0 or not 0 < nonzero <= 1:
        got = f"m_acc={m_acc}, m_p={m_p}, n={n}, chunk={chunk}, nonzero={nonzero}"
        expected = "m_acc, n and chunk of 1 or more, m_p of 0 or more, 0 < nonzero <= 1"
        raise FormatError("no accumulation", where="vrr", expected=expected, got=got)
    if chunk is None or chunk == 1 or chunk >= n:
        return [(m_p, max(1, round(nonzero * n)))]
    inner = max(1, round(nonzero * chunk))
    return [(m_p, inner), (min(m_acc, m_p + round(math.log2(inner))), math.ceil(n / chunk))]


@lru_cache(maxsize=4096)
def _retention(m_acc: int, m_p: int, n: int) -> float:
    """Theorem 1, one sum.

    Three kinds of sums, each with its probability and what it keeps of n: (1) full swamping first at addition i, after
    partial swamping has cost a; (2) partial swamping up to stage j - 1; (3) no swamping.
    """
    kept = weight = 0.0
    whole = _lost(m_acc, m_p, m_p)
    for i in _additions(m_acc, math.floor(whole), n):
        q = _two_q(m_acc, i) * torch.special.erf(2.0**m_acc / (2 * (i - 1)).sqrt())
        kept += float(((i - whole) * q).sum())
        weight += float(q.sum())
    for j in range(2, m_p + 1):
        lost = _lost(m_acc, m_p, j - 1)
        if n > lost:
            first, last = _bounds(m_acc, m_p, j - 1, n), _bounds(m_acc, m_p, j, n)
            q_j = 2.0 ** (m_acc - m_p + j) * math.erfc(first) * math.erf(last)
            kept += (n - lost) * q_j
            weight += q_j
    none = math.erf(_bounds(m_acc, m_p, 1, n))
    return (kept + n * none) / ((weight + none) * n)


def _lost(m_acc: int, m_p: int, stages: int) -> float:
    """Variance that the partial swamping of the first `stages` stages costs (a of the theorem)."""
    return 2.0 ** (m_acc - 3 * m_p) / 3 * sum(2**j * (2**j - 1) * (2 ** (j + 1) - 1) for j in range(1, stages + 1))


def _bounds(m_acc: int, m_p: int, stage: int, n: int) -> float:
    """Where stage `stage` ends, in standard deviations of s_n over sqrt 2, as erf takes it."""
    return 2.0 ** (m_acc - m_p + stage) / math.sqrt(2 * n)


def _two_q(m_acc: int, i: Tensor) -> Tensor:
    return torch.special.erfc(2.0**m_acc / (2 * i).sqrt())


def _additions(m_acc: int, after: int, n: int) -> Iterator[Tensor]:
    """i from 2 to n - 1 as float64, in pieces: those above `after`, and where erfc(2^m_acc / sqrt(2 i)) is not 0."""
    first = max(2, after + 1, math.floor(2.0 ** (2 * m_acc) / (2 * 27.3**2)))
    for start in range(first, n, _TERMS_AT_ONCE):
        yield torch.arange(start, min(start + _TERMS_AT_ONCE, n), dtype=torch.float64, device="cpu")
