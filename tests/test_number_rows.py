"""The rows of benchmarks/numerics: they run, none is missing, and a cliff between two of them is seen."""

import inspect

from benchmarks._number_rows import CLIFF, DTYPES, LAYOUTS, Row, cast_rows, cliffs, gemm_rows
from runtime.kernels.cast import block_codes, public


def test_every_row_runs_and_every_public_cast_has_one() -> None:
    rows: set[Row] = set()
    for calls in cast_rows(40):
        for call in calls.values():
            call()
        rows |= calls.keys()
    names = {row.function.partition(",")[0] for row in rows}
    for module in (public, block_codes):
        casts = {
            name for name, each in inspect.getmembers(module, inspect.isfunction) if each.__module__ == module.__name__
        }
        assert {name for name in casts if name.split("_")[0] in ("quantize", "encode", "decode")} <= names
    assert {(row.dtype, row.layout) for row in rows if row.function == "quantize"} == {
        (str(dtype).removeprefix("torch."), layout) for dtype in DTYPES for layout in LAYOUTS
    }


def test_products() -> None:
    for call in gemm_rows(8).values():
        call()


def test_a_cliff_is_seen() -> None:
    times = {
        Row("quantize", format, "", dtype): 1.0 for format in ("e4m3", "nf4") for dtype in ("fp32", "fp16", "bf16")
    }
    times[Row("quantize", "nf4", "", "fp16")] = 20.0
    worst, share = next(iter(cliffs(times).items()))
    assert (worst.format, worst.dtype) == ("nf4", "fp16")
    assert share > CLIFF
    assert sum(each > CLIFF for each in cliffs(times).values()) == 1
