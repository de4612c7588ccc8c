"""The Triton casts against the oracle, bit for bit, on the CPU. Run by test_triton_cast.py with TRITON_INTERPRET=1."""

import itertools

import pytest
import torch

from runtime.kernels.cast_plans import block_plan, cast_plan
from runtime.kernels.cpu.block_cast import fast_blocks
from runtime.kernels.triton.block_cast import launch_block_cast, launch_finite_amax
from runtime.kernels.triton.cast import launch_cast
from runtime.numerics.block_casts import grid_of_blocks, quantize_blocks
from runtime.numerics.block_formats import get_block_format
from runtime.numerics.casts import to_grid
from runtime.numerics.formats import get_format
from runtime.numerics.grid import round_to_grid
from runtime.numerics.scaling import compute_scale, divisor_of_amax, tile_shape, two_level_divisor
from runtime.numerics.specs import ROUNDINGS, QuantSpec, ScaleSpec
from tests.runtime.kernels.test_block_cast import ALL, hard_blocks
from tests.runtime.kernels.test_cast import NAMES, hard_values, same_bits

DRAW = (2**63 + 5, 2**31 + 2, (9 << 32) + 2**31 + 7, 2**40 + 13)
"""Seed, step, stream and offset, with high bits set in each."""
KEYS = ("seed", "step", "stream", "offset")


def _launch(x, spec, scale, dtype=torch.float32, draw=DRAW):  # type: ignore[no-untyped-def]
    plan = cast_plan(spec.format, spec.rounding)
    assert plan is not None
    tile = tile_shape(x.shape, spec.scale or ScaleSpec())
    return launch_cast(x, scale, plan, dtype, tile, draw if spec.rounding == "stochastic" else None)


@pytest.mark.parametrize("name", [name for name in NAMES if cast_plan(name, "nearest_even") is not None])
def test_every_format_and_rounding(name: str) -> None:
    for mode in ROUNDINGS:
        is_read_widely = mode == "nearest_even" and name in ("e4m3", "dlfloat16", "int8")
        inputs = (torch.float32, torch.bfloat16, torch.float16) if is_read_widely else (torch.float32,)
        for dtype in inputs:
            x, spec = hard_values(name).to(dtype), QuantSpec(name, mode)
            if cast_plan(name, mode) is None:
                continue
            want = round_to_grid(x, get_format(name), mode, None, *DRAW)  # to_grid of fp32 is the identity
            assert same_bits(_launch(x, spec, None)[0], want), (mode, dtype)


@pytest.mark.parametrize("scale", ["tensor/amax", "row/pow2", "column/amax", "block[3,16]/amax", "block[128,128]/pow2"])
def test_every_scale(scale: str) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(3, 11, 129), (1, 2100), (1100, 1), (17,), ()]
    for shape, (name, mode) in itertools.product(shapes, (("e4m3", "nearest_even"), ("int8", "stochastic"))):
        x = torch.randn(shape, generator=generator) * 100
        spec = QuantSpec(name, mode, ScaleSpec.parse(scale))
        s = compute_scale(x, spec)
        assert same_bits(_launch(x, spec, s)[0], to_grid(x, spec, s, **dict(zip(KEYS, DRAW)))), (shape, name, mode)


def test_a_slice_has_the_bits_of_its_base() -> None:
    x = torch.randn(4001, generator=torch.Generator().manual_seed(3))
    spec = QuantSpec("e4m3", "stochastic")
    whole = _launch(x, spec, None, draw=(1, 2, 3, 0))[0]
    for begin, size in ((1, 7), (1023, 2050), (4000, 1)):
        part = _launch(x[begin : begin + size].clone(), spec, None, draw=(1, 2, 3, begin))[0]
        assert torch.equal(part, whole[begin : begin + size])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_narrow_outputs(dtype: torch.dtype) -> None:
    name = "int8" if dtype == torch.int8 else "e5m2"
    x = hard_values(name)
    x = x[~x.isnan()] if dtype == torch.int8 else x
    got, _ = _launch(x, QuantSpec(name), None, dtype)
    assert got.dtype == dtype
    assert torch.equal(got.float().nan_to_num(7.0), to_grid(x, QuantSpec(name), None).nan_to_num(7.0) + 0.0)


def test_the_flag_and_the_empty_tensor() -> None:
    for value, expected in {448.0: False, 464.0: False, 464.1: True, torch.inf: True, torch.nan: True}.items():
        x = torch.full((3000,), 0.5)
        x[2777] = value
        assert bool(_launch(x, QuantSpec("e4m3"), None)[1]) == expected, value
    out, beyond = _launch(torch.empty(0, 5), QuantSpec("e4m3"), None)
    assert out.shape == (0, 5)
    assert not beyond


@pytest.mark.parametrize("name", ALL)
def test_block_formats(name: str) -> None:
    """Every scale rule; columns that leave a last block ragged; stochastic words at any offset."""
    row = get_block_format(name)
    cases = [(75, "nearest_even"), (5, "nearest_away"), (32, "toward_zero"), (37, "stochastic")]
    for columns, mode in cases if name in ("mxfp8:scale=floor", "mxint8:scale=rceil", "nvfp4") else cases[:1]:
        x = hard_blocks(columns)
        plan, keys = block_plan(row, mode), dict(zip(KEYS, DRAW))
        assert plan is not None
        divisor = divisor_of_amax(launch_finite_amax(x, 16), row) if name == "nvfp4" else torch.ones(())
        assert torch.equal(divisor, two_level_divisor(x, None, row) if name == "nvfp4" else divisor)
        got, said = launch_block_cast(x, plan, divisor, False, torch.float32, DRAW if mode == "stochastic" else None)
        assert same_bits(got, grid_of_blocks(x, row, mode, **keys)), mode
        fast = fast_blocks(x, row, plan, is_divided=False, is_stochastic=mode == "stochastic", **keys)
        assert fast is None or said == fast.said


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_block_formats_in_other_dtypes(name: str) -> None:
    """Read as bf16 and fp16, written as bf16, nvfp4 with its divisor divided out, and nothing to cast."""
    row = get_block_format(name)
    plan = block_plan(row, "nearest_even")
    assert plan is not None
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(3, 50, generator=torch.Generator().manual_seed(5)).to(dtype)
        divisor = two_level_divisor(x, None, row) if name == "nvfp4" else torch.ones(())
        got, said = launch_block_cast(x, plan, divisor, name == "nvfp4", torch.float32, None)
        assert same_bits(got, quantize_blocks(x.float(), row))
        assert said == 0
        narrow, _ = launch_block_cast(x, plan, divisor, False, torch.bfloat16, None)
        assert same_bits(narrow.float(), grid_of_blocks(x, row, "nearest_even"))
    empty, said = launch_block_cast(torch.empty(0, 32), plan, torch.ones(()), False, torch.float32, None)
    assert (empty.shape, int(said)) == ((0, 32), 0)
    assert launch_finite_amax(torch.empty(4, 0), 16) == 0
