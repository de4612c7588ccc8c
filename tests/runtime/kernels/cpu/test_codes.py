"""encode and decode in C++ are the oracle's, code by code: every format, dtype, rounding and scale."""

import dataclasses
import sys
from collections.abc import Callable
from inspect import unwrap
from types import FrameType

import pytest
import torch
from torch import Tensor

from runtime.errors import FormatError
from runtime.kernels.cast.values import Overflow
from runtime.kernels.cpu.codes import can_decode, can_encode, codes_library
from runtime.numerics import decode, encode, quantize
from runtime.numerics.codes import codes_of_grid, grid_of_codes
from runtime.numerics.format_kinds import LookupFormat
from runtime.numerics.formats import FORMATS, get_format
from runtime.numerics.grid import round_to_grid
from runtime.numerics.specs import ROUNDINGS, Rounding

pytestmark = pytest.mark.skipif(codes_library() is None, reason="needs a C++ compiler")

MORE = [
    "1-6-9", "1-4-3:top=fnuz", "1-5-10:subnormals=no", "1-2-1:top=none", "1-8-14", "uint8:zero=100", "int3:range=full",
    "int24", "uint16", "dlfloat16:e0=zero", "pow2:bits=5",
]  # fmt: skip
NAMES = [*FORMATS, *MORE]


def slow_calls(run: Callable[[], object]) -> list[str]:
    """The oracle's functions that `run` calls."""
    oracles = map(unwrap, (round_to_grid, codes_of_grid, grid_of_codes))
    slow = {function.__code__: function.__name__ for function in oracles}
    called: list[str] = []

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in slow:
            called.append(slow[frame.f_code])

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before)
    return called


def _hard(name: str, count: int = 3000) -> Tensor:
    """Values around the whole range of a format, ties and ends, zeros, Inf, and NaN where there is a code for it."""
    row = get_format(name)
    generator = torch.Generator().manual_seed(count)
    size = torch.exp2(torch.rand(count, generator=generator) * 30 - 25) * row.max
    x = torch.randn(count, generator=generator) * size
    codes = torch.randint(0, 2 ** min(row.bits, 16), (count,), generator=generator)
    grid = grid_of_codes(codes, row).nan_to_num()
    ends = torch.tensor([0.0, -0.0, row.max, -row.max, row.tiny, row.tiny / 2, torch.inf, -torch.inf])
    ends = torch.cat([ends, torch.tensor([torch.nan, -torch.nan])]) if row.has_nan else ends
    return torch.cat([x, grid, grid * 1.0625, ends])


@pytest.mark.parametrize("name", NAMES)
def test_every_code_decodes_as_the_oracle_says(name: str) -> None:
    row = get_format(name)
    codes = torch.arange(2**row.bits) if row.bits <= 16 else torch.randint(0, 2**row.bits, (70001,))
    dtypes = [torch.int64, *([torch.int32] if row.bits < 32 else []), *([torch.uint8] if row.bits <= 8 else [])]
    for dtype in (*dtypes, torch.int16) if row.bits < 16 else dtypes:
        given = codes.to(dtype)
        assert can_decode(given, name)
        expected = grid_of_codes(codes, row)
        found = decode(given, name)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32)), dtype
    for wrong in (-1, 2**row.bits):
        with pytest.raises(FormatError, match="not codes of"):
            decode(torch.tensor([0, wrong]), name)


@pytest.mark.parametrize("name", NAMES)
def test_encode_is_the_oracle(name: str) -> None:
    row, x = get_format(name), _hard(name)
    modes: list[Rounding] = [mode for mode in ROUNDINGS if can_encode(name, mode)]
    assert len(modes) >= 3 or name == "e8m0", modes
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = x.to(dtype)
        if dtype == torch.float16:  # torch itself does not always keep the sign of a NaN there
            values = torch.where(values.isnan(), torch.nan, values)
        for mode in modes:
            wanted = codes_of_grid(round_to_grid(values, row, mode, seed=5, step=2), row)
            found = encode(values, name, mode, seed=5, step=2)
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted), (dtype, mode)


@pytest.mark.parametrize("name", ["e4m3", "dlfloat16", "int8", "nf4", "fp32"])
@pytest.mark.parametrize("shape", [(), (1,), (7, 9), (3, 5, 64), (0, 4)])
def test_scales_shapes_and_strides(name: str, shape: tuple[int, ...]) -> None:
    row, x = get_format(name), torch.randn(shape) * 3
    scales: list[Tensor | None] = [None, torch.tensor(0.3)]
    if shape:
        scales += [torch.rand(*shape[:-1], 1) + 0.1, torch.rand(shape[-1]) + 0.1, torch.rand(shape) + 0.1]
    for scale in scales:
        wanted = codes_of_grid(round_to_grid(x, row, "nearest_even", scale), row)
        assert torch.equal(encode(x, name, "nearest_even", scale), wanted)
        if len(shape) > 1:
            turned = x.mT.contiguous().mT
            assert torch.equal(encode(turned, name, "nearest_even", scale), wanted)
            assert torch.equal(decode(wanted.mT.contiguous().mT, name), grid_of_codes(wanted, row))


def test_nan_without_a_code_is_refused() -> None:
    x = torch.tensor([1.0, torch.inf, torch.nan])
    for name in ("int8", "e2m1", "nf4", "hfp8-143"):
        with pytest.raises(FormatError, match="no code for NaN"):
            encode(x, name)
        assert encode(x[:2], name).shape == (2,)


@pytest.mark.parametrize("overflow", ["saturate", "ieee"])
@pytest.mark.parametrize("name", NAMES)
def test_quantize_and_encode_are_the_oracle_in_double_and_beyond(name: str, overflow: Overflow) -> None:
    """fp64 values that fp32 does not hold, and overflow to what the top code means."""
    row, x = get_format(name), _hard(name)
    scale = torch.tensor(0.3, dtype=torch.float64)
    for values in (x.double() * (1 + 2.0**-40), x.double(), x, x.bfloat16()):
        for mode in ROUNDINGS:
            if mode == "toward_zero" and name == "int1":
                continue
            for divisor in (None, scale):
                factor = divisor if divisor is None or values.dtype == torch.float64 else divisor.float()
                grid = round_to_grid(values, row, mode, factor, seed=5, step=2, overflow=overflow)
                wanted = (grid if factor is None else grid * factor).to(values.dtype)
                found = quantize(values, name, mode, divisor, seed=5, step=2, overflow=overflow)
                assert torch.equal(found.isnan(), wanted.isnan())
                assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7)), mode
                is_number = ~wanted.isnan()
                assert torch.equal(found.signbit()[is_number], wanted.signbit()[is_number])
                if row.has_nan or not bool(grid.isnan().any()):
                    codes = encode(values, name, mode, divisor, seed=5, step=2, overflow=overflow)
                    assert torch.equal(codes, codes_of_grid(grid, row)), mode


def test_a_row_is_as_good_as_its_name() -> None:
    x = torch.randn(64, 64)
    own = LookupFormat("own", (-1.0, -0.25, 0.0, 2.0))
    other = dataclasses.replace(get_format("e4m3"), bias=9)  # the name is another row's
    for row in (get_format("e4m3"), get_format("nf4"), get_format("int8"), own, other):
        grid = round_to_grid(x, row, "nearest_even")
        assert torch.equal(quantize(x, row, "nearest_even"), grid)
        codes = encode(x, row, "nearest_even")
        assert torch.equal(codes, codes_of_grid(grid, row))
        assert torch.equal(decode(codes, row), grid)
        assert slow_calls(lambda row=row: decode(encode(quantize(x, row), row), row)) == [], row.name  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("overflow", ["saturate", "ieee"])
def test_no_call_takes_the_oracle(dtype: torch.dtype, overflow: Overflow) -> None:
    """Told by the functions that run, not by time; twice, as plans of tables are made by the oracle once."""
    x = torch.randn(64, 64, dtype=dtype)
    for name in NAMES:
        layouts = (x, x.t(), x[:, ::2], x[0, 0])
        for mode in ROUNDINGS:
            if mode == "toward_zero" and name == "int1":
                continue
            codes = [encode(given, name, mode, overflow=overflow) for given in layouts]
            again = [(given, name, mode) for given in layouts]

            def run(again=again, codes=codes, name=name) -> None:  # type: ignore[no-untyped-def]
                for each in again:
                    encode(*each, overflow=overflow)
                    quantize(*each, overflow=overflow)
                    quantize(*each, overflow=overflow, scale=0.3)
                for code in codes:
                    decode(code, name)

            assert slow_calls(run) == [], (name, mode)
