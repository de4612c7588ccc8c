"""Random bits: the published known answers, and that a word depends on its own coordinates alone."""

import pytest
import torch

from runtime.errors import FormatError
from runtime.numerics.random import philox, random_bits

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # counter, key, result: Random123's kat_vectors for philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    words = philox(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == result


def test_random_bits_puts_its_arguments_where_the_docstring_says() -> None:
    assert random_bits(4, seed=0).tolist() == list(KNOWN_ANSWERS[0][2])
    (c0, c1, c2, c3), (k0, k1), result = KNOWN_ANSWERS[2]
    stream = c3 + (c1 >> 16 << 32)
    offset = 4 * (c0 + ((c1 & 0xFFFF) << 32))
    assert random_bits(4, seed=k0 + (k1 << 32), step=c2, stream=stream, offset=offset).tolist() == list(result)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 1021])
def test_a_slice_gets_the_words_of_its_base(offset: int) -> None:
    base = random_bits(5000, seed=11, step=3, stream=8)
    assert torch.equal(random_bits(2000, seed=11, step=3, stream=8, offset=offset), base[offset : offset + 2000])


def test_seed_step_and_stream_each_change_the_words_and_the_words_look_uniform() -> None:
    base = random_bits(40000, seed=1)
    for other in ({"seed": 2}, {"seed": 1 + 2**32}, {"seed": 1, "step": 1}, {"seed": 1, "stream": 1}):
        assert int((random_bits(40000, **other) == base).sum()) < 3  # by chance: 40000 / 2^32
    assert abs(base.double().mean().item() / 2**32 - 0.5) < 5 / (12 * 40000) ** 0.5
    for bit in range(32):
        assert abs((base >> bit & 1).double().mean().item() - 0.5) < 5 * 0.5 / 200


def test_no_elements_and_arguments_out_of_range() -> None:
    assert random_bits(0, seed=1).shape == (0,)
    for wrong in ({"step": -1}, {"step": 2**32}, {"stream": 2**48}, {"offset": -4}):
        with pytest.raises(FormatError, match="does not fit the counter"):
            random_bits(4, seed=0, **wrong)
