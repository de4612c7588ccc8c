"""Codes: of zeros, NaN and tables; every code of every row is compared in test_casts.py."""

import math

import pytest
import torch

from runtime.errors import FormatError
from runtime.numerics.codes import codes_of_grid, grid_of_codes
from runtime.numerics.format_kinds import LookupFormat
from runtime.numerics.formats import get_format


def test_minus_zero_is_zero_where_its_code_means_nan() -> None:
    zeros = torch.tensor([0.0, -0.0])
    assert codes_of_grid(zeros, get_format("e5m2-fnuz")).tolist() == [0, 0]
    assert codes_of_grid(zeros, get_format("e5m2")).tolist() == [0, 0x80]
    assert codes_of_grid(zeros, get_format("fp4-radix4")).tolist() == [0, 8]
    assert codes_of_grid(zeros, get_format("nf4")).tolist() == [7, 7]


def test_nan_has_a_code_or_is_refused() -> None:
    nan = torch.tensor([math.nan, 1.0])
    codes = {"e4m3": 0x7F, "e5m2": 0x7F, "e4m3-fnuz": 0x80, "e8m0": 0xFF, "dlfloat16": 0x7FFF}
    assert {name: codes_of_grid(nan, get_format(name)).tolist()[0] for name in codes} == codes
    for name in ("e2m1", "int8", "uint8", "nf4", "fp4-radix4", "int1", "pow2"):
        with pytest.raises(FormatError, match=f"{name} has no code for NaN"):
            codes_of_grid(nan, get_format(name))


def test_a_table_in_any_order() -> None:
    row = LookupFormat("shuffled", (0.5, -2.0, math.nan, 3.0))
    codes = torch.arange(4)
    assert grid_of_codes(codes, row).nan_to_num(9).tolist() == [0.5, -2, 9, 3]
    assert torch.equal(codes_of_grid(grid_of_codes(codes, row), row).long(), codes)
    assert (row.min, row.max, row.tiny, row.codes, row.signed, row.has_nan) == (-2, 3, 0.5, 3, True, True)


@pytest.mark.parametrize(
    "values", [(1.0, 2.0, 3.0), (1.0, 1.0), (0.1, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1e300, 1.0)]
)
def test_what_is_no_table(values: tuple[float, ...]) -> None:
    with pytest.raises(FormatError, match="is not a lookup format"):
        LookupFormat("bad", values)
