"""The Triton cast against the oracle, bit for bit, on the CPU. Run by test_triton_cast.py with TRITON_INTERPRET=1."""

import itertools

import pytest
import torch

from runtime.kernels.triton.cast import launch_cast
from runtime.numerics.cast_plans import cast_plan
from runtime.numerics.casts import to_grid
from runtime.numerics.formats import get_format
from runtime.numerics.grid import round_to_grid
from runtime.numerics.scaling import compute_scale, tile_shape
from runtime.numerics.specs import ROUNDINGS, QuantSpec, ScaleSpec
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
        inputs = (torch.float32, torch.bfloat16, torch.float16) if mode == "nearest_even" else (torch.float32,)
        for dtype in inputs:
            x, spec = hard_values(name).to(dtype), QuantSpec(name, mode)
            if cast_plan(name, mode) is None:
                continue
            want = round_to_grid(x, get_format(name), mode, None, *DRAW)  # to_grid of fp32 is the identity
            assert same_bits(_launch(x, spec, None)[0], want), (mode, dtype)


@pytest.mark.parametrize("scale", ["tensor/amax", "row/pow2", "column/amax", "block[3,16]/amax", "block[128,128]/pow2"])
def test_every_scale(scale: str) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(3, 43, 129), (1, 5000), (1500, 1), (17,), ()]
    for shape, name, mode in itertools.product(shapes, ("e4m3", "int8", "dlfloat16"), ("nearest_even", "stochastic")):
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
