"""Packing: what is unpacked is the grid bit for bit; the bytes are the oracle's, and as few as the format says."""

import math

import pytest
import torch
from torch import Tensor

from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cast.packing import has_lost_nan, pack, packing_for, unpack
from runtime.kernels.cast.scales import compute_scale
from runtime.kernels.cpu.packing import fast_pack
from runtime.numerics import packing as oracle
from runtime.numerics.codes import codes_of_grid
from runtime.numerics.formats import get_format
from runtime.numerics.packing import Packing
from runtime.numerics.specs import QuantSpec
from runtime.quantize.storage import storage_dtype
from tests.machine_facts import needs_kernels

SCALAR = [
    *("e4m3", "e5m2", "hfp8-143", "fp8-152", "e3m2", "e2m3", "e2m1", "fp4-radix4", "int4", "uint4", "int2", "int5"),
    *("dlfloat16", "nf4", "1-4-7", "int4:range=full", "e4m3 stochastic tensor/amax", "int8 nearest_even tensor/amax"),
]
BLOCK = [
    *(
        "mxfp8",
        "mxfp8-e5m2",
        "mxfp6",
        "mxfp6-e3m2",
        "mxfp4",
        "mxint8",
        "nvfp4",
        "mxfp4:scale=rceil",
        "mxfp8:scale=even",
    ),
    *("nvfp4 stochastic", "mxfp4 stochastic", "mxfp8 toward_zero"),
]
SHAPES = [(1,), (7,), (3, 5), (33, 70), (64, 129), (2, 3, 17, 40), (1, 1), (130, 64)]


def grid_of(spec: QuantSpec, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(shape) * torch.exp2(torch.randint(-12, 12, shape).float())
    x.view(-1)[::5] = 0
    x.view(-1)[::11] *= -0.0
    scale = compute_scale(x, spec)
    return fast_to_grid(x, spec, scale, dtype=dtype, seed=3)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, all NaN alike."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((
        (a.float().view(torch.int32) == b.float().view(torch.int32)) | (a.isnan() & b.isnan())).all())  # fmt: skip


def specs() -> list[QuantSpec]:
    blocks = [
        f"{text}{'' if ' ' in text else ' nearest_even'} {along}"
        for text in BLOCK
        for along in ("row", "column", "batched-column")
    ]
    return [QuantSpec.parse(text) for text in (*SCALAR, *blocks)]


@pytest.mark.parametrize("spec", specs(), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_grid_comes_back_bit_for_bit(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    if spec.along == "batched-column" and len(shape) < 2:
        return
    for dtype in {torch.float32, torch.bfloat16 if storage_dtype(spec.format) == torch.bfloat16 else torch.float32}:
        grid = grid_of(spec, shape, dtype)
        packing = packing_for(spec, grid.dtype)
        if packing is None:
            assert get_format(spec.format).bits > 8
            assert dtype == torch.bfloat16
            continue
        buffer = pack(grid, spec)
        assert buffer.dtype == torch.uint8
        assert buffer.shape == (packing.nbytes(shape),)
        assert torch.equal(buffer, oracle.pack(grid, packing))
        assert same(unpack(buffer, shape, spec, grid.dtype), grid)
        assert same(oracle.unpack(buffer, shape, packing, grid.dtype), grid)


@pytest.mark.parametrize("text", SCALAR)
def test_codes_are_those_of_the_format_and_take_its_bits(text: str) -> None:
    spec = QuantSpec.parse(text)
    grid = grid_of(spec, (64, 72), torch.float32)
    row, buffer = get_format(spec.format), pack(grid, spec)
    bits = row.bits if row.bits <= 8 else 16
    assert 8 * (buffer.numel() - packing_for(spec, grid.dtype).has_flag) == grid.numel() * bits  # type: ignore[union-attr]
    number = int.from_bytes(buffer.numpy().tobytes(), "little")
    codes = codes_of_grid(grid, row).flatten().tolist()
    assert [number >> i * bits & (1 << bits) - 1 for i in range(len(codes))] == codes


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("mxfp8 nearest_even column", 8.25),
        ("mxfp6 nearest_even row", 6.25),
        ("mxfp4 nearest_even column", 4.25),
        ("nvfp4 nearest_even row", 4.5),
    ],
)
def test_blocks_take_their_bits_and_a_byte_a_block(text: str, bits: float) -> None:
    spec = QuantSpec.parse(text)
    assert 8 * pack(grid_of(spec, (64, 96), torch.bfloat16), spec).numel() == 64 * 96 * bits


@pytest.mark.parametrize(
    "text",
    ["e4m3", "e5m2", "dlfloat16", "mxfp8 nearest_even row", "mxfp4 nearest_even column", "nvfp4 nearest_even row"],
)
def test_nan_keeps_its_place_where_it_has_a_code(text: str) -> None:
    spec = QuantSpec.parse(text)
    x = torch.randn(40, 70)
    x[3, 4] = torch.nan
    grid = fast_to_grid(x, spec, compute_scale(x, spec), dtype=torch.float32)
    assert grid.isnan().any()
    assert same(unpack(pack(grid, spec), grid.shape, spec, grid.dtype), grid)
    assert not has_lost_nan(pack(grid, spec), packing_for(spec, grid.dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["int4", "e2m1", "fp4-radix4", "uint4"])
def test_nan_without_a_code_is_said_and_never_lost(text: str) -> None:
    spec = QuantSpec.parse(text)
    x = torch.randn(40, 70).abs()
    x[3, 4] = torch.nan
    grid = fast_to_grid(x, spec, None, dtype=torch.bfloat16)
    packing = packing_for(spec, grid.dtype)
    assert packing is not None
    buffer = pack(grid, spec)
    assert torch.equal(buffer, oracle.pack(grid, packing))
    assert has_lost_nan(buffer, packing)
    assert unpack(buffer, grid.shape, spec, grid.dtype).isnan().all()
    assert oracle.unpack(buffer, grid.shape, packing, grid.dtype).isnan().all()


def test_values_at_the_ends_of_fp32() -> None:
    """Blocks of the smallest and the largest scales, and one that rounded up to 2^128."""
    for text in (
        "mxfp4:scale=rceil nearest_even row",
        "mxfp8 nearest_even column",
        "mxint8 nearest_even row",
        "nvfp4 nearest_even row",
    ):
        spec = QuantSpec.parse(text)
        for factor in (2.0**-149, 2.0**-130, 2.0**120, 3.0e38):
            x = torch.rand(64, 64).clamp(min=0.3) * factor
            grid = fast_to_grid(x, spec, compute_scale(x, spec), dtype=torch.float32)
            assert same(unpack(pack(grid, spec), grid.shape, spec, grid.dtype), grid), (text, factor)


def test_formats_that_are_no_smaller_or_no_codes_are_not_packed() -> None:
    for text, dtype in [
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("int8", torch.int8),
        ("fp32", torch.float32),
        ("psq5", torch.float32),
        ("int24", torch.float32),
    ]:
        assert packing_for(QuantSpec.parse(text), dtype) is None
    assert packing_for(QuantSpec.parse("int8"), torch.float32) is not None  # a NaN was among its values


def test_shapes_are_known_without_values() -> None:
    for spec in specs():
        meta = torch.ops.lp.pack(torch.empty(3, 33, 41, device="meta"), spec.text)
        assert meta.numel() == Packing(spec.format, spec.along).nbytes((3, 33, 41))
        assert torch.ops.lp.unpack(meta, (3, 33, 41), spec.text, torch.float32).shape == (3, 33, 41)


def test_an_empty_tensor_is_packed() -> None:
    for text in ("e4m3", "int4", "mxfp8 nearest_even column", "nvfp4 nearest_even row"):
        spec = QuantSpec.parse(text)
        grid = torch.empty(0, 4)
        assert unpack(pack(grid, spec), (0, 4), spec, torch.float32).shape == (0, 4)


@needs_kernels
def test_the_kernel_serves_what_is_trained_in() -> None:
    for spec in specs():
        if spec.along == "batched-column":
            continue
        grid = grid_of(spec, (64, 65), torch.float32)
        packing = packing_for(spec, grid.dtype)
        assert packing is not None
        assert fast_pack(grid, packing) is not None, spec


def test_a_block_told_by_its_values_alone() -> None:
    """nvfp4 under stochastic rounding: the largest element of a block need not be 6."""
    spec = QuantSpec.parse("nvfp4 nearest_even row")
    scale = torch.tensor([0.40625, 1.0, 13.0, 2.0**-9, 448.0])
    elements = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    torch.manual_seed(1)
    for most in range(1, 8):
        chosen = elements[torch.randint(0, most + 1, (5, 16))] * torch.where(torch.rand(5, 16) < 0.5, -1.0, 1.0)
        grid = (chosen * scale[:, None]).contiguous()
        assert same(unpack(pack(grid, spec), grid.shape, spec, grid.dtype), grid)
    assert math.isclose(pack(grid, spec).numel(), 5 * 8 + 5)
