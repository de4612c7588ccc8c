"""Fingerprint: the same sums in Python's integers, and what changes it: any bit, any place, whatever wrote it."""

import ctypes

import pytest
import torch
from torch import Tensor

from runtime.kernels.cpu import fingerprint as kernel
from runtime.kernels.cpu.fingerprint import LANES, PRIME, WORDS, fingerprint
from tests.machine_facts import needs_kernels

pytestmark = needs_kernels


def _expected(x: Tensor) -> bytes:
    """NH and the polynomial of fingerprint.cpp, word by word."""
    secret, data = kernel._secret(), x.contiguous().view(torch.uint8).numpy().tobytes()
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    values = []
    for lane in range(LANES):
        low, high, value = secret.low[lane], secret.high[lane], 1
        for start in range(0, len(words), WORDS):
            block = words[start : start + WORDS]
            block += [0] * (WORDS - len(block))
            total = 0
            for i, word in enumerate(block):
                total += ((word % 2**32 + low[i]) % 2**32) * ((word // 2**32 + high[i]) % 2**32)
            for half in (total % 2**32, total % 2**64 // 2**32):
                value = (value * secret.point[lane] + half) % PRIME
        values.append(value)
    return bytes((ctypes.c_uint64 * LANES)(*values))


@pytest.mark.parametrize("count", [1, 2, 3, 1023, 1024, 1025, 5000, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_sums_in_whole_numbers(count: int, dtype: torch.dtype) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    assert fingerprint(x) == _expected(x)


def test_of_all_ones_bits() -> None:
    x = torch.full((5000,), -1, dtype=torch.int32).view(torch.float32)
    assert fingerprint(x) == _expected(x)


def test_an_array_at_an_odd_address() -> None:
    memory = torch.randint(0, 255, (9001,), dtype=torch.uint8)
    assert fingerprint(memory[1:]) == _expected(memory[1:].clone())


def test_every_bit_counts() -> None:
    x = torch.randn(40, 37)
    before, bits, seen = fingerprint(x), x.view(torch.int32).view(-1), set()
    for element in range(0, bits.numel(), 7):
        for bit in (0, 1, 15, 31):
            bits[element] ^= -(2**31) if bit == 31 else 1 << bit
            seen.add(fingerprint(x))
            bits[element] ^= -(2**31) if bit == 31 else 1 << bit
    assert len(seen) == 4 * len(range(0, bits.numel(), 7))
    assert before not in seen
    assert fingerprint(x) == before


@pytest.mark.parametrize("shape", [(64, 64), (300, 512)])
def test_order_counts(shape: tuple[int, int]) -> None:
    """What a plain sum would not see: elements, rows and blocks that change places."""
    x = torch.randn(shape)
    moved = [x.flip(0), x.flip(1), x.roll(1, 0), x.view(-1).roll(2).view(shape), x.view(-1).roll(1024).view(shape), -x]
    assert len({fingerprint(each) for each in [x, *moved]}) == 1 + len(moved)


def test_zeros_tell_their_sign_and_a_nan_is_itself() -> None:
    zero, nan = torch.zeros(9), torch.full((9,), torch.nan)
    assert fingerprint(zero) != fingerprint(-zero)
    assert fingerprint(nan) == fingerprint(nan.clone())


@pytest.mark.parametrize(
    "view", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x.permute(1, 0)[3:], lambda x: x.view(8, 5, 8).mT]
)
def test_views(view: object) -> None:
    x = torch.randn(40, 8)
    seen: Tensor = view(x)  # type: ignore[operator]
    before = fingerprint(seen)
    assert before == fingerprint(view(x.clone()))  # type: ignore[operator]
    seen[-1, -1] += 1
    assert fingerprint(seen) != before


def test_threads_do_not_change_it() -> None:
    x, threads = torch.randn(300, 512), torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(fingerprint(x))
    finally:
        torch.set_num_threads(threads)
    assert found == {_expected(x)}


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_library", lambda: None)
    assert fingerprint(torch.ones(3)) is None
