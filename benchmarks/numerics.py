"""Casts against a copy, and GEMMs with fp32 results against torch.mm in fp32, on the CPU, in one run.

    python -m benchmarks.numerics [--rounds 9] [--threads 2] [--rows 40] [--size 2048]

Casts: 16.8 M fp32 elements, time over that of `out.copy_(x)`. The first table is `quantize(x, format, out=out)`, which
like the copy writes memory that is there. The rows of the second allocate their result, and on many machines the page
faults of 64 MiB cost more than the cast: `x.clone()` shows how much.
GEMMs: rate over that of torch.mm on the same values in fp32, packing included; FWD is NT, BWD NN, GRAD TN.
Emulated: operands e4m3, accumulated in chunks of 64 as the AccumulateSpec says.
Rows: every public function x format x rounding x dtype x layout (_number_rows.py), those first that are furthest from
the rows beside them; "cliff" marks what is beyond 5 times their median. --rows 0 prints all.
"""

import argparse
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor

from benchmarks._number_rows import CLIFF, Row, cast_rows, cliffs, gemm_rows
from benchmarks._peers import cast_peers
from benchmarks._timing import least_ms, median_ms, show
from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cpu import accumulate
from runtime.kernels.cpu.accumulate import accumulate_library
from runtime.kernels.cpu.gemm import gemm_library, int8_library, multiply, multiply_int8
from runtime.numerics import decode, encode, quantize
from runtime.numerics.scaling import compute_scale
from runtime.numerics.specs import AccumulateSpec, GemmSpec, QuantSpec

INTO = (
    "e4m3", "1-6-9", "dlfloat16", "hfp8-143", "e5m2", "bf16", "int8", "uint8:zero=100", "nf4", "fp4-radix4",
    "mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4",
    "e4m3 stochastic", "1-6-9 stochastic", "dlfloat16 stochastic", "nf4 stochastic", "mxfp8 stochastic",
)  # fmt: skip
"""By `quantize`, into a tensor that is there."""
CASTS = (
    "e4m3", "1-6-9", "e4m3 stochastic", "nf4", "int8 nearest_even tensor/amax", "e4m3 nearest_even row/amax",
    "e4m3 nearest_even block[1,128]/amax", "mxfp8", "mxfp8 nearest_even column", "mxfp8 stochastic column", "nvfp4",
    "nvfp4 nearest_even column",
)  # fmt: skip
"""Casts of a GEMM's operand, scales computed; a bare block format goes through `quantize`."""
CODES = ("e4m3", "e5m2", "1-6-9", "dlfloat16", "bf16", "int8", "nf4")
ACCUMULATORS = (
    "1-6-9/64", "dlfloat16/64", "1-6-9/64 stochastic", "1-6-9/64 toward_zero", "1-6-9/64 rounded",
    "dlfloat16/64 rounded", "1-6-9/64 per_chunk",
    "1-6-9/64 stochastic per_chunk",
)  # fmt: skip
SIDE = 4096
"""Casts are of SIDE x SIDE values."""
GEMMS = ((512, 512, 512), (1024, 1024, 1024), (2048, 768, 3072))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each contender (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--rows", type=int, default=40, help="rows of the last two tables, 0 for all (default: 40)")
    parser.add_argument("--size", type=int, default=2048, help="side of the matrices of those casts (default: 2048)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    every = _every_cast(options.size, options.rounds, options.rows), _every_gemm(options.rounds, options.rows)
    show(*every, *_casts(options.rounds), _gemms(options.rounds), width=160)


def _every_cast(size: int, rounds: int, most: int) -> Table:
    x, times = torch.randn(size, size), dict[Row, float]()
    out = torch.empty_like(x)
    copies = []
    for calls in cast_rows(size):
        measured = least_ms({str(row): call for row, call in calls.items()}, rounds, warmups=1)
        copies.append(least_ms({"copy": lambda: out.copy_(x)}, 2 * rounds)["copy"])
        times |= {row: measured[str(row)] / copies[-1] for row in calls}
    return _row_table(f"{size} x {size} values, times a copy of fp32 ({min(copies):.2f} ms)", times, most)


def _every_gemm(rounds: int, most: int, size: int = 256) -> Table:
    a, b = torch.randn(size, size), torch.randn(size, size)
    calls = {str(row): call for row, call in gemm_rows(size).items()} | {"mm": lambda: torch.mm(a, b)}
    times = least_ms(calls, rounds, warmups=1)
    shares = {row: times[str(row)] / times["mm"] for row in gemm_rows(size)}
    return _row_table(f"runtime.gemm {size}^3, times torch.mm in fp32 ({times['mm']:.2f} ms)", shares, most)


def _row_table(title: str, times: dict[Row, float], most: int) -> Table:
    table = Table("function", "format", "rounding", "dtype", "layout", "x", "x its neighbours", "", title=title)
    beside = cliffs(times)
    for row in list(beside)[: most or None]:
        cells = row.function, row.format, row.rounding, row.dtype, row.layout
        table.add_row(*cells, f"{times[row]:.1f}", f"{beside[row]:.1f}", "cliff" if beside[row] > CLIFF else "")
    table.caption = (
        f"{sum(share > CLIFF for share in beside.values())} cliffs in {len(times)} rows; slowest: "
        + ", ".join(
            f"{row.function} {row.format} {row.rounding} {row.dtype} {row.layout} {times[row]:.0f}"
            for row in sorted(times, key=lambda row: -times[row])[:5]
        )
    )
    return table


def _casts(rounds: int) -> list[Table]:
    x = torch.randn(SIDE, SIDE)
    out = torch.empty_like(x)
    copy: dict[str, Callable[[], object]] = {"out.copy_(x)": lambda: out.copy_(x)}
    there = copy | {text: _cast_into(x, out, QuantSpec.parse(text)) for text in INTO}
    there["e4m3 with a scale"] = lambda: quantize(x, "e4m3", scale=0.3, out=out)
    allocated = copy | {"x.clone()": x.clone} | {text: _cast(x, QuantSpec.parse(text)) for text in CASTS}
    e4m3 = QuantSpec("e4m3")
    allocated["e4m3, written as bf16"] = lambda: fast_to_grid(x, e4m3, None, dtype=torch.bfloat16)
    allocated["e4m3, then .bfloat16()"] = lambda: fast_to_grid(x, e4m3, None).bfloat16()
    coded = copy | {"x.clone()": x.clone}
    for name in CODES:
        codes = encode(x, name)
        coded[f"encode {name}"] = lambda name=name: encode(x, name)
        coded[f"decode {name}"] = lambda name=name, codes=codes: decode(codes, name)
    peers, missing = cast_peers(x)
    tables = [
        _cast_table("casts of 16.8 M fp32 into a tensor that is there", median_ms(there, rounds)),
        _cast_table("casts of 16.8 M fp32, result allocated", median_ms(allocated, rounds)),
        _cast_table("codes of 16.8 M fp32, result allocated", median_ms(coded, rounds)),
        _cast_table("the same by others, result allocated", median_ms(copy | peers, rounds)),
    ]
    tables[-1].caption = "; ".join(missing)
    return tables


def _cast_table(title: str, times: dict[str, float]) -> Table:
    table = Table("cast", "ms", "x copy", title=f"{title}: lower is better; memory's limit is 1")
    for name, each in times.items():
        table.add_row(name, f"{each:.1f}", f"{each / times['out.copy_(x)']:.2f}")
    return table


def _cast_into(x: Tensor, out: Tensor, spec: QuantSpec) -> Callable[[], Tensor]:
    return lambda: quantize(x, spec.format, spec.rounding, out=out)


def _cast(x: Tensor, spec: QuantSpec) -> Callable[[], Tensor]:
    if spec.is_block and spec.along is None:
        return lambda: quantize(x, spec.format, spec.rounding)
    return lambda: fast_to_grid(x, spec, compute_scale(x, spec))


def _gemms(rounds: int) -> Table:
    table = Table(
        "M x K x N", "contender", "GFLOP/s", "x fp32", title="GEMMs: higher is better; the units' limit is 2 and 4"
    )
    if gemm_library() is None:
        table.caption = "the cpu backend is missing here: no C++ compiler, or no AVX512-BF16"
        return table
    for m, k, n in GEMMS:
        a, b = (torch.randn(*shape).bfloat16().float() for shape in ((m, k), (k, n)))
        a_t, b_t = a.t().contiguous().t(), b.t().contiguous().t()
        half_a, half_b = a.bfloat16(), b.bfloat16()
        int_a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        int_b = torch.randint(-127, 128, (n, k), dtype=torch.int8).t()
        int_a_t, int_b_n = int_a.t().contiguous().t(), int_b.contiguous()
        contenders: dict[str, Callable[[], object]] = {
            "torch.mm fp32": lambda a=a, b=b: a @ b,
            "FWD, NT": lambda a=a, b=b_t: multiply(a, b),
            "BWD, NN": lambda a=a, b=b: multiply(a, b),
            "GRAD, TN": lambda a=a_t, b=b: multiply(a, b),
            "bf16 tensors, NN": lambda a=half_a, b=half_b: multiply(a, b),
            "torch.mm bf16, rounded to bf16": lambda a=half_a, b=half_b: a @ b,
            "int8 (torch._int_mm), to fp32": lambda a=int_a, b=int_b: torch._int_mm(a, b).float(),
        }
        if int8_library():
            contenders["int8, FWD, NT"] = lambda a=int_a, b=int_b: multiply_int8(a, b)
            contenders["int8, BWD, NN"] = lambda a=int_a, b=int_b_n: multiply_int8(a, b)
            contenders["int8, GRAD, TN"] = lambda a=int_a_t, b=int_b_n: multiply_int8(a, b)
        for name in ACCUMULATORS if accumulate_library() else ():
            spec = GemmSpec(QuantSpec("e4m3"), QuantSpec("e4m3"), AccumulateSpec.parse(name))
            contenders[f"emulated {name}"] = _emulated(fast_to_grid(a, spec.lhs, None), b, spec)
        times = median_ms(contenders, rounds)
        for name, each in times.items():
            rate = 2e-6 * m * k * n / each
            table.add_row(f"{m} x {k} x {n}", name, f"{rate:.0f}", f"{times['torch.mm fp32'] / each:.2f}")
        table.add_section()
    return table


def _emulated(a: Tensor, b: Tensor, spec: GemmSpec) -> Callable[[], Tensor]:
    grid = fast_to_grid(b, spec.rhs, None)
    return lambda: accumulate.multiply(a, grid, spec)


if __name__ == "__main__":
    main()
