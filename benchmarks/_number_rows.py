"""Rows for benchmarks/numerics: every public function of numbers, every kind of format, rounding, dtype and layout.

A row is a call and what it is held against: a copy of as many fp32, or torch.mm of the same sizes in fp32. Where it
falls off a cliff is told by its neighbours, the rows that differ in one thing: more than CLIFF times their median.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from runtime import gemm
from runtime.numerics import decode, decode_blocks, encode, encode_blocks, quantize
from runtime.numerics.block_formats import is_block_format
from runtime.numerics.scaling import compute_scale
from runtime.numerics.specs import QuantSpec, Rounding, ScaleSpec

CLIFF = 5.0
FORMATS = (
    *("e4m3", "1-6-9", "dlfloat16", "bf16", "fp16", "binary8p3"),
    *("nf4", "e8m0", "int4", "int8", "int16", "uint8:zero=100"),
    *("mxfp8", "mxint8", "nvfp4"),
)
"""A float, one without subnormals, those of 16 bits; tables; integers; blocks."""
ROUNDINGS: tuple[Rounding, ...] = ("nearest_even", "stochastic", "toward_zero")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "strided")
SCALES = ("tensor/amax", "row/amax", "column/amax", "block[1,128]/amax", "row/pow2")
OPERANDS = ("fp32", "bf16", "e4m3", "nf4", "int8", "mxfp8", "nvfp4")
ADDED_BY_GPUS = ("hopper-fp8", "blackwell-fp8", "hopper-bf16")
ACCUMULATORS = (
    *("fp32", "fp32/64", "1-6-9/64", "1-6-9/64 stochastic", "1-6-9/64 toward_zero", "1-6-9/64 rounded"),
    *("1-6-9/64 per_chunk", "bf16", "dlfloat16/64", "fp32 toward_zero", "int32", "int16 wrap"),
    *ADDED_BY_GPUS,
)


@dataclass(frozen=True)
class Row:
    """What is called. Empty where a function has no such choice."""

    function: str
    format: str = ""
    rounding: str = ""
    dtype: str = ""
    layout: str = ""

    def is_neighbour(self, other: "Row") -> bool:
        """Whether the same function with one other choice."""
        differ = [each.name for each in fields(self) if getattr(self, each.name) != getattr(other, each.name)]
        return len(differ) == 1 and differ != ["function"]


Calls = dict[Row, Callable[[], object]]


def cast_rows(size: int) -> Iterator[Calls]:
    """Of size x size values; one kind of input at a time, so that not all are held."""
    for dtype in DTYPES:
        for layout in LAYOUTS:
            yield _of_input(_laid(size, dtype, layout), str(dtype).removeprefix("torch."), layout)
    yield _of_codes(_laid(size, torch.float32, "contiguous"))


def gemm_rows(size: int) -> Calls:
    """Of size x size matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    calls: Calls = {}
    for operand in OPERANDS:
        for how in ACCUMULATORS:
            if how.startswith("int") and operand != "int8":
                continue
            if how in ADDED_BY_GPUS and operand not in ("bf16", "e4m3"):
                continue
            calls[Row("gemm", operand, how)] = lambda operand=operand, how=how: gemm(
                a, b, a_format=operand, b_format=operand, accumulate=how
            )
    return calls


def cliffs(times: dict[Row, float]) -> dict[Row, float]:
    """Each row's time over the median of its neighbours', the worst first; 1 where it has none."""
    beside = {row: [time for other, time in times.items() if row.is_neighbour(other)] for row in times}
    shares = {row: time / statistics.median(beside[row] or [time]) for row, time in times.items()}
    return dict(sorted(shares.items(), key=lambda each: -each[1]))


def _laid(size: int, dtype: torch.dtype, layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if layout == "strided":
        return torch.randn(size, 2 * size, generator=generator).to(dtype)[:, ::2]
    x = torch.randn(size, size, generator=generator).to(dtype)
    return x if layout == "contiguous" else x.t()


def _of_input(x: Tensor, dtype: str, layout: str) -> Calls:
    out = torch.empty(x.shape, dtype=x.dtype)
    calls: Calls = {}
    for format in FORMATS:
        for rounding in ROUNDINGS:
            row = Row("", format, rounding, dtype, layout)
            calls[_of(row, "quantize")] = lambda f=format, r=rounding: quantize(x, f, r, out=out)
            if is_block_format(format):
                calls[_of(row, "encode_blocks")] = lambda f=format, r=rounding: encode_blocks(x, f, r)
            else:
                calls[_of(row, "encode")] = lambda f=format, r=rounding: encode(x, f, r)
        if not is_block_format(format):
            scaled = Row("quantize, scale", format, "nearest_even", dtype, layout)
            calls[scaled] = lambda f=format: quantize(x, f, "nearest_even", scale=0.3, out=out)
            beyond = Row("quantize, overflow ieee", format, "nearest_even", dtype, layout)
            calls[beyond] = lambda f=format: quantize(x, f, "nearest_even", overflow="ieee", out=out)
    for scale in SCALES:
        spec = QuantSpec("e4m3", scale=ScaleSpec.parse(scale))
        calls[Row("compute_scale", scale, "", dtype, layout)] = lambda spec=spec: compute_scale(x, spec)
    return calls


def _of_codes(x: Tensor) -> Calls:
    calls: Calls = {}
    for format in FORMATS:
        if is_block_format(format):
            blocks = encode_blocks(x, format)
            calls[Row("decode_blocks", format)] = lambda f=format, b=blocks: decode_blocks(b[0], b[1], f, b[2])
        else:
            codes = encode(x, format)
            wide = codes.long()
            calls[Row("decode", format)] = lambda f=format, c=codes: decode(c, f)
            calls[Row("decode, of int64", format)] = lambda f=format, c=wide: decode(c, f)
    return calls


def _of(row: Row, function: str) -> Row:
    return Row(function, row.format, row.rounding, row.dtype, row.layout)
