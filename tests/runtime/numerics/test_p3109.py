"""The P3109 rows against gfloat: every code, every rounding that both have, both kinds of overflow."""

import gfloat.formats
import numpy as np
import pytest
import torch
from gfloat import Domain, RoundMode, Signedness
from torch import Tensor

from lpcompile.policy.names import format_of
from runtime.errors import FormatError, NotSupported
from runtime.kernels.cast.values import Overflow
from runtime.numerics import decode, encode, get_format, quantize
from runtime.numerics.embedding import finite_values
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.random import random_bits
from runtime.numerics.specs import Rounding

SIZES = [(8, precision) for precision in range(2, 8)] + [(4, 2), (5, 3), (6, 4), (10, 4), (15, 9)]
NAMES = [f"binary{k}p{precision}{suffix}" for k, precision in SIZES for suffix in ("", "sf")]
MODES: dict[Rounding, RoundMode] = {
    "nearest_even": RoundMode.TiesToEven,
    "nearest_away": RoundMode.TiesToAway,
    "toward_zero": RoundMode.TowardZero,
}


def theirs(name: str) -> gfloat.FormatInfo:
    k, precision = name.removeprefix("binary").removesuffix("sf").split("p")
    domain = Domain.Finite if name.endswith("sf") else Domain.Extended
    return gfloat.formats.format_info_p3109(int(k), int(precision), Signedness.Signed, domain)


def inputs(name: str) -> Tensor:
    """Every value, every midpoint, what lies beside them, and what is special; 24 bits each."""
    grid = torch.tensor(finite_values(get_format(name)), dtype=torch.float64)
    ends = torch.tensor(
        [grid[-1] * 1.01, grid[-1] * 4, grid[-1] + (grid[-1] - grid[-2]) / 2, 1e30, torch.inf, torch.nan]
    )
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, ends.double(), -ends.double()]).float()
    infinity = torch.tensor(torch.inf)
    return torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)])


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("name", NAMES)
def test_every_code_means_what_gfloat_says(name: str) -> None:
    row, info = get_format(name), theirs(name)
    assert isinstance(row, FloatFormat)
    assert (row.bits, row.max, row.tiny) == (info.k, info.max, info.smallest_subnormal)
    codes = torch.arange(2**info.k)
    wanted = torch.tensor([gfloat.decode_float(info, code).fval for code in codes.tolist()], dtype=torch.float32)
    assert same(decode(codes, name), wanted)
    assert torch.equal(encode(wanted, name, overflow="ieee").long(), codes)
    assert row.codes == int(wanted.isfinite().sum())


@pytest.mark.parametrize("overflow", ["saturate", "ieee"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_every_rounding_is_gfloats(name: str, mode: Rounding, overflow: Overflow) -> None:
    x, info = inputs(name), theirs(name)
    wanted = gfloat.round_ndarray(info, x.double().numpy(), MODES[mode], sat=overflow == "saturate")
    assert same(quantize(x, name, mode, overflow=overflow), torch.from_numpy(wanted).float())
    assert same(quantize(x.double(), name, mode, overflow=overflow).float(), torch.from_numpy(wanted).float())


@pytest.mark.parametrize("name", ["binary8p3", "binary8p5sf", "binary6p4"])
def test_stochastic_rounding_is_gfloats_of_the_same_bits(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randint(-(2**16), 2**16, (100_000,), generator=generator) * 2.0**-14 * 1.5).float()  # exact in their sum
    bits = random_bits(x.numel(), seed=5, step=7)
    wanted = gfloat.round_ndarray(
        theirs(name), x.double().numpy(), RoundMode.StochasticFastest, True, bits.numpy(), srnumbits=32
    )
    assert same(quantize(x, name, "stochastic", seed=5, step=7), torch.from_numpy(wanted.astype(np.float32)))


@pytest.mark.parametrize(
    ("spelling", "row"),
    [
        ("binary8p3", "binary8p3"),
        ("Binary8p3se", "binary8p3"),
        ("p3109_k8p3se", "binary8p3"),
        ("P3109-8p4sf", "binary8p4sf"),
        ("binary16", "fp16"),
    ],
)
def test_spellings_of_others(spelling: str, row: str) -> None:
    assert format_of(spelling) == row
    assert get_format(format_of(spelling)) == get_format(row)


def test_what_is_not_built_says_so() -> None:
    assert get_format("binary8p3se") is get_format("binary8p3")
    with pytest.raises(NotSupported, match="unsigned"):
        get_format("binary8p3ue")
    with pytest.raises(NotSupported, match="no fraction bits"):
        get_format("binary8p1")
    for name in ("binary8p8", "binary8p9"):
        with pytest.raises(FormatError, match="not a P3109 format"):
            get_format(name)
    with pytest.raises(FormatError):
        get_format("binary16p3")
