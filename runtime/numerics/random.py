"""Random bits: Philox4x32-10, a function from a counter to 128 bits with no state.

The word of element i is a function of (seed, step, stream, offset + i) alone, so no layout, thread count, device or
recomputation changes it, and a slice that passes its flat offset gets the words of its base.

    key      (seed mod 2^32, seed div 2^32)                       seed    64 bits
    counter  (n mod 2^32, n div 2^32 + 2^16 (stream div 2^32),    n       (offset + i) div 4, 48 bits
              step, stream mod 2^32)                              step    32 bits, stream 48 bits
    word     number (offset + i) mod 4 of the four

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and the known-answer vectors
published with it.
"""

import torch
from torch import Tensor

from runtime.errors import FormatError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, in units of 2^-32
_ROUNDS = 10
_PIECE = 1 << 18  # counters worked on at once: the nine temporaries stay in cache


def random_bits(
    count: int,
    *,
    seed: int,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """`count` uniform 32-bit words as int64 in [0, 2^32), those of elements offset ... offset + count - 1.

    `step` is the optimizer step, `stream` tells apart everything that must not share bits (site, role, sample, rank).
    A seed is taken modulo 2^64; FormatError if another argument is out of the range above.
    """
    check_counter(step, stream, offset)
    words = torch.empty(count, dtype=torch.int64, device=device)
    key = (seed & _MASK, seed >> 32 & _MASK)
    for begin in range(0, count, 4 * _PIECE):
        size = min(4 * _PIECE, count - begin)
        first, skip = divmod(offset + begin, 4)
        n = torch.arange(first, first + (skip + size + 3) // 4, dtype=torch.int64, device=device)
        high = (n >> 32) + (stream >> 32 << 16)
        counter = (n & _MASK, high, torch.full_like(n, step), torch.full_like(n, stream & _MASK))
        words[begin : begin + size] = torch.stack(philox(counter, key), dim=1).flatten()[skip : skip + size]
    return words


def check_counter(step: int, stream: int, offset: int) -> None:
    """FormatError if an argument does not fit its place in the counter."""
    for name, value, limit in (("step", step, 32), ("stream", stream, 48), ("offset", offset, 50)):
        if isinstance(value, torch.SymInt):
            continue  # a number that compiled code reads is checked as it reads
        if not 0 <= value < 2**limit:
            raise FormatError(f"{name} does not fit the counter", expected=f"0 <= {name} < 2^{limit}", got=str(value))


def signed_seed(seed: int) -> int:
    """The seed modulo 2^64, as the signed 64-bit number an op's schema carries."""
    return (seed + 2**63) % 2**64 - 2**63


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on tensors of 32-bit words held in int64; all of one shape.

    A round is (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)). The 64-bit product
    wraps into the sign bit of int64, which changes no bit: the shift is arithmetic and the mask drops the copies.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> 32 & _MASK) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = (product0 >> 32 & _MASK) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3
