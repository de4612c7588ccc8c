"""VRR against hand values, the paper's table and a simulation in our own emulated accumulators."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.analysis.vrr import MAX_LOG_LOSS, log_loss, min_accumulator, vrr
from runtime import gemm
from runtime.errors import FormatError

M_P = 5  # a product of two 1-5-2 values

BY_HAND = {
    (4, 256): 0.7279, (5, 256): 0.9598, (6, 256): 0.9961, (7, 256): 0.9990, (8, 256): 0.9997,
    (4, 1024): 0.5653, (5, 1024): 0.7090, (6, 1024): 0.9453, (7, 1024): 0.9980, (8, 1024): 0.9995,
    (4, 4096): 0.4754, (5, 4096): 0.5644, (6, 4096): 0.6970, (7, 4096): 0.9217, (8, 4096): 0.9990, (9, 4096): 0.9998,
}  # fmt: skip


@pytest.mark.parametrize(("m_acc", "n"), BY_HAND)
def test_hand_values(m_acc: int, n: int) -> None:
    assert vrr(m_acc, M_P, n) == pytest.approx(BY_HAND[m_acc, n], abs=6e-5)


def _theorem_term_by_term(m_acc: int, m_p: int, n: int) -> float:
    """Theorem 1 as it is printed, in Python floats: no vectors, no bounds, no left-out terms."""

    def q(x: float) -> float:
        return math.erfc(x / math.sqrt(2)) / 2

    def a(stages: int) -> float:
        return 2.0 ** (m_acc - 3 * m_p) / 3 * sum(2**j * (2**j - 1) * (2 ** (j + 1) - 1) for j in range(1, stages + 1))

    first = {
        i: 2 * q(2**m_acc / math.sqrt(i)) * (1 - 2 * q(2**m_acc / math.sqrt(i - 1))) for i in range(2, n) if i > a(m_p)
    }
    second = {
        j: 2.0 ** (m_acc - m_p + j)
        * 2 * q(2.0 ** (m_acc - m_p + j - 1) / math.sqrt(n))
        * (1 - 2 * q(2.0 ** (m_acc - m_p + j) / math.sqrt(n)))
        for j in range(2, m_p + 1)
        if n > a(j - 1)
    }  # fmt: skip
    third = 1 - 2 * q(2.0 ** (m_acc - m_p + 1) / math.sqrt(n))
    kept = sum((i - a(m_p)) * p for i, p in first.items()) + sum((n - a(j - 1)) * p for j, p in second.items())
    return (kept + n * third) / (n * (sum(first.values()) + sum(second.values()) + third))


@pytest.mark.parametrize("n", [2, 17, 300, 5000])
@pytest.mark.parametrize(("m_acc", "m_p"), [(3, 3), (4, 5), (6, 7), (9, 5), (12, 5), (7, 0)])
def test_the_theorem_term_by_term(m_acc: int, m_p: int, n: int) -> None:
    assert vrr(m_acc, m_p, n) == pytest.approx(_theorem_term_by_term(m_acc, m_p, n), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(m_acc=st.integers(1, 12), m_p=st.integers(1, 9), n=st.integers(1, 20000), chunk=st.sampled_from([None, 32, 64]))
def test_a_share_that_grows_with_the_accumulator(m_acc: int, m_p: int, n: int, chunk: int | None) -> None:
    wider, narrower = vrr(m_acc + 1, m_p, n, chunk), vrr(m_acc, m_p, n, chunk)
    assert 0 < narrower <= 1 + 1e-12
    if m_acc >= m_p:  # below, the theorem's stages of partial swamping begin before the first addition
        assert wider >= narrower - 0.01


def test_longest_sum_of_each_accumulator_grows_2_6_times_per_bit() -> None:
    longest = {4: 76, 5: 196, 6: 530, 7: 1480, 8: 3930, 9: 10100}
    for bits, n in longest.items():
        assert log_loss(bits, M_P, math.floor(0.98 * n)) < MAX_LOG_LOSS < log_loss(bits, M_P, math.ceil(1.03 * n))


# length of each sum -> mantissa bits predicted: without chunks, in chunks of 64 by the whole length on the product of
# both levels' VRR (reading A), and by each level with its own length (reading B, which min_accumulator takes)
FORWARD = {
    "resnet32-cifar": ((27, 144, 288, 576), (3, 5, 6, 7), (4, 5, 5, 6), (3, 4, 4, 4)),
    "resnet18": ((147, 576, 1152, 2304, 4608), (5, 7, 7, 8, 9), (5, 6, 6, 7, 8), (4, 4, 4, 4, 4)),
    "alexnet": (
        (363, 1600, 1728, 3456, 2304, 9216, 4096),
        (6, 8, 8, 8, 8, 9, 9),
        (5, 7, 7, 7, 7, 8, 8),
        (4, 4, 4, 4, 4, 5, 4),
    ),
}
GRADIENT = {
    "resnet32-cifar": ((131072, 32768, 8192), (12, 11, 9), (11, 9, 8), (8, 6, 5)),
    "resnet18": (
        (256 * 112**2, 256 * 56**2, 256 * 28**2, 256 * 14**2, 256 * 7**2),
        (17, 14, 13, 11, 10),
        (14, 13, 11, 10, 9),
        (11, 10, 8, 7, 5),
    ),
    "alexnet": ((256 * 55**2, 256 * 27**2, 256 * 13**2, 256), (14, 13, 11, 6), (13, 11, 10, 5), (10, 8, 7, 4)),
}


@pytest.mark.parametrize(("lengths", "plain", "whole", "by_level"), [*FORWARD.values(), *GRADIENT.values()])
def test_predictions_of_the_three_networks(
    lengths: tuple[int, ...], plain: tuple[int, ...], whole: tuple[int, ...], by_level: tuple[int, ...]
) -> None:
    assert tuple(min_accumulator(M_P, n) for n in lengths) == plain
    assert tuple(min_accumulator(M_P, n, 64) for n in lengths) == by_level
    chunked = [(_by_whole_length(n), bits) for n, bits in zip(lengths, whole) if n > 64]
    assert all(found == bits for found, bits in chunked)


def _by_whole_length(n: int) -> int:
    return next(m for m in range(1, 30) if n * (1 - vrr(m, M_P, n, 64)) < MAX_LOG_LOSS)


def test_sparse_products_need_fewer_bits() -> None:
    lengths = GRADIENT["resnet18"][0]
    assert [min_accumulator(M_P, n, nonzero=0.5) for n in lengths] == [15, 13, 12, 10, 9]
    assert [min_accumulator(M_P, n, 64, 0.5) for n in lengths] == [11, 10, 8, 7, 5]


# Table 1 of the paper as it is quoted from memory, (plain, chunks of 64), m_p = 5; its own non-zero ratios are measured
# ones that nobody quotes, and it never goes below m_p.
PAPER = {
    (131072, 131072, 32768, 8192): ((11, 11, 10, 9), (8, 8, 6, 6)),
    (256 * 112**2, 256 * 56**2, 256 * 28**2, 256 * 14**2, 256 * 7**2): ((15, 15, 12, 10, 9), (10, 9, 8, 6, 5)),
}


@pytest.mark.parametrize("lengths", PAPER)
def test_the_papers_table_to_one_bit(lengths: tuple[int, ...]) -> None:
    """Chunked sums by reading B within one bit, where reading A is off by 2 to 4; plain sums within two bits."""
    plain, chunked = PAPER[lengths]
    for n, bits, bits_of_chunks in zip(lengths, plain, chunked):
        assert abs(max(M_P, min_accumulator(M_P, n, 64, 0.5)) - bits_of_chunks) <= 1
        assert min(abs(min_accumulator(M_P, n, None, share) - bits) for share in (0.25, 0.5, 1.0)) <= 1
    assert max(_by_whole_length(n) - bits for n, bits in zip(lengths, chunked)) >= 3


def _measured(m_acc: int, n: int, chunk: int | None = None) -> float:
    """Variance of 32 x 64 sums of n products with 5 mantissa bits in a 1-8-m_acc accumulator, nearest-even, over the
    exact. A product is a normal number of 5 mantissa bits times a random sign.
    """
    source = torch.Generator().manual_seed(0)
    normal, signs = torch.randn(32, n, generator=source), torch.randn(n, 64, generator=source).sign()
    kept = gemm(normal, signs, a_format=f"1-8-{M_P}", b_format="e2m1", accumulate=f"1-8-{m_acc}", chunk=chunk)
    exact = gemm(normal, signs, a_format=f"1-8-{M_P}", b_format="e2m1")
    return float(kept.double().square().mean() / exact.double().square().mean())


@pytest.mark.parametrize(("m_acc", "n"), [(7, 256), (6, 256), (7, 1024), (8, 1024), (8, 4096), (9, 4096)])
def test_what_is_predicted_to_be_kept_is_kept(m_acc: int, n: int) -> None:
    """Both variances are of the same 2048 sums, so that the noise of sampling cancels: 3% is left for rounding."""
    assert vrr(m_acc, M_P, n) > 0.99
    assert _measured(m_acc, n) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("n", [256, 1024, 4096])
def test_the_prediction_is_safe_for_nearest_rounding(n: int) -> None:
    """VRR never promises more than the simulation keeps, and both find the knee within 2 bits of each other."""
    predicted, measured = ([f(m) for m in range(2, 10)] for f in (lambda m: vrr(m, M_P, n), lambda m: _measured(m, n)))
    assert all(p <= kept + 0.03 for p, kept in zip(predicted[2:], measured[2:]))
    knees = [next(m for m, kept in enumerate(row, start=2) if kept > 0.9) for row in (predicted, measured)]
    assert 0 <= knees[0] - knees[1] <= 2


def test_chunks_keep_what_a_plain_sum_loses() -> None:
    assert _measured(4, 4096) < 0.6 < 0.95 < _measured(4, 4096, chunk=64)
    assert vrr(4, M_P, 4096) < 0.6 < 0.9 < vrr(4, M_P, 4096, chunk=64)


@pytest.mark.parametrize("chunk", [1, 256, 1000])
def test_a_chunk_of_one_or_of_everything_is_no_chunk(chunk: int) -> None:
    assert vrr(5, M_P, 256, chunk) == vrr(5, M_P, 256)


@pytest.mark.parametrize("arguments", [(0, 5, 10), (5, -1, 10), (5, 5, 0), (5, 5, 10, 0), (5, 5, 10, None, 0.0)])
def test_no_accumulation(arguments: tuple) -> None:  # type: ignore[type-arg]
    with pytest.raises(FormatError, match="vrr: no accumulation"):
        vrr(*arguments)
