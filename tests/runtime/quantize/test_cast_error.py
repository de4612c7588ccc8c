"""What a cast loses: on a sample the values of the whole tensor's cast, and numbers as their definitions say."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.kernels.cast.scales import compute_scale
from runtime.numerics import quantize
from runtime.numerics.formats import get_format
from runtime.numerics.scaling import expand_scale
from runtime.numerics.specs import QuantizerSpec, QuantSpec
from runtime.quantize.cast_error import CastError, cast_sample, measure
from runtime.quantize.quantizer import to_grid
from runtime.quantize.sampling import run_of, sample_of

CASTS = [
    "e4m3", "hfp8-143", "bf16", "fp16", "dlfloat16", "e4m3 nearest_even tensor/amax", "e4m3 nearest_even tensor/pow2",
    "int8 nearest_even row/amax", "int8 nearest_even column/amax", "e4m3 nearest_even column/pow2",
    "e4m3 nearest_even block[1,128]/amax", "int4 nearest_even block[32,64]/amax", "int4 nearest_even tensor/sawb",
    "mxfp8:scale=rceil nearest_even row", "mxfp8 nearest_even column", "mxfp4 nearest_even column",
    "mxint8 nearest_even row", "nvfp4 nearest_even row", "nvfp4 nearest_even column", "nf4 nearest_even row/amax",
    "fp4-radix4 nearest_even tensor/amax", "psq5", "ptq4", "bhq4", "fp32",
]  # fmt: skip


def _values(x: Tensor, spec: QuantSpec) -> Tensor:
    scale = compute_scale(x, spec)
    grid = to_grid(x, scale, spec).float()
    return grid if scale is None else grid * expand_scale(scale, x.shape, spec)


def _uneven(*shape: int) -> Tensor:
    """Columns and rows of very different sizes."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[-1])
    return x * torch.linspace(0.01, 3, x.shape[-2]).unsqueeze(-1)


@pytest.mark.parametrize("cast", CASTS)
def test_a_sample_casts_as_the_whole(cast: str) -> None:
    x, spec = _uneven(640, 96), QuantSpec.parse(cast)
    sample = sample_of(x, 9000, run=run_of(spec))
    assert sample.runs is not None
    assert 768 <= sample.part.numel() <= 9000
    assert torch.equal(cast_sample(sample, spec).float(), sample.take(_values(x, spec)))


@pytest.mark.parametrize("cast", ["nvfp4 nearest_even batched-column", "mxfp8 nearest_even batched-column", "e4m3"])
@pytest.mark.parametrize("rows", [64, 33])
def test_a_sample_of_a_batch_casts_as_the_whole(cast: str, rows: int) -> None:
    x, spec = _uneven(5, 4, rows, 48), QuantSpec.parse(cast)
    sample = sample_of(x, 7000, is_batched=True, run=run_of(spec))
    assert sample.runs is not None
    assert torch.equal(cast_sample(sample, spec).float(), sample.take(_values(x, spec)))


@pytest.mark.parametrize("largest", [448.0, 448.0 * 2**-9, 449.0, 447.0, 1e-40, 3e38])
@pytest.mark.parametrize("rule", ["amax", "pow2"])
def test_a_scale_of_the_largest_is_that_of_the_tensor(rule: str, largest: float) -> None:
    x, spec = torch.linspace(-0.9, 0.9, 640 * 32).view(640, 32) * largest, QuantSpec.parse(
        f"e4m3 nearest_even tensor/{rule}"
    )  # fmt: skip
    x[500, 3] = largest
    assert torch.equal(sample_of(x, 500).scale(spec), compute_scale(x, spec))  # type: ignore[arg-type]


def test_a_scale_per_channel_of_a_convolution() -> None:
    x, spec = torch.randn(64, 8, 3, 3) * torch.logspace(-2, 2, 64).view(-1, 1, 1, 1), QuantSpec.parse(
        "int8 nearest_even channel/amax"
    )  # fmt: skip
    for size in (10**6, 400):
        sample = sample_of(x, size)
        assert torch.equal(cast_sample(sample, spec), sample.take(_values(x, spec)))


@pytest.mark.parametrize("cast", ["e4m3", "e5m2", "bf16", "hfp8-143", "mxfp8", "nvfp4", "int8"])
def test_numbers_are_those_of_their_definitions(cast: str) -> None:
    """Against numpy in float64, from the public cast."""
    x = _uneven(96, 64) * 40
    x[:3] = 0.0
    found = CastError(*measure(sample_of(x, 10**6), [QuantSpec.parse(cast)])[0].tolist())
    exact, values = x.double().numpy(), quantize(x, cast).double().numpy()
    error, held = values - exact, exact != 0
    assert found.count == x.numel()
    assert found.nonzero == held.sum()
    assert found.underflow == ((values == 0) & held).sum()
    assert found.square == pytest.approx((exact**2).sum(), rel=1e-12)
    assert found.error == pytest.approx((error**2).sum(), rel=1e-5)
    assert found.mean_relative == pytest.approx(np.abs(error[held] / exact[held]).mean(), rel=1e-5)
    assert found.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / (error**2).sum()), abs=1e-4)


@pytest.mark.parametrize("cast", ["e4m3", "e5m2", "hfp8-143", "int8", "nf4", "e4m3 nearest_even row/amax"])
def test_overflow_is_what_an_unbounded_grid_would_put_above_the_largest(cast: str) -> None:
    x, spec = _uneven(64, 64) * 500, QuantSpec.parse(cast)
    found = CastError(*measure(sample_of(x, 10**6), [spec])[0].tolist())
    row, scale = get_format(spec.format), compute_scale(x, spec)
    scaled = x.double() / (1.0 if scale is None else scale.double())
    beyond = (row.max + row.beyond_max) / 2 if spec.format == "nf4" else None
    step = 0.5 if spec.format == "int8" else 2.0 ** (math.floor(math.log2(row.max)) - getattr(row, "mantissa", 0) - 1)
    assert found.overflow == (scaled.abs() > (beyond or row.max + step)).sum()
    grid = to_grid(x, scale, spec).double()
    assert found.saturated == (grid.abs() == row.max).sum()
    assert found.saturated >= found.overflow > 0 or scale is not None


def test_a_block_overflows_where_its_scale_was_rounded_down() -> None:
    """The floor of the specification puts 500 under 2^0, where the largest is 448; rceil does not."""
    x = torch.full((1, 32), 1.0)
    x[0, 0] = 500.0
    sample = sample_of(x, 100)
    floor, ceiling = (
        CastError(*each.tolist()) for each in measure(sample, [QuantSpec.parse(f"mxfp8{end} nearest_even row")
                                                              for end in ("", ":scale=rceil")])
    )  # fmt: skip
    assert (floor.overflow, floor.saturated) == (1, 1)
    assert (ceiling.overflow, ceiling.saturated) == (0, 0)


@pytest.mark.parametrize("cast", CASTS)
def test_what_is_not_finite_is_left_out(cast: str) -> None:
    x = _uneven(640, 96)
    x[7, 5], x[300, 2] = math.inf, math.nan
    sums = measure(sample_of(x, 10**6), [QuantSpec.parse(cast)])
    assert sums.isfinite().all()
    assert sums[0, 1] == x.numel() - 2
    assert measure(sample_of(x, 9000), [QuantSpec.parse(cast)]).isfinite().all()


@pytest.mark.parametrize("cast", CASTS[:-1])
@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (1, 1), (3, 7), (17,)])
def test_small_and_empty(cast: str, shape: tuple[int, ...]) -> None:
    x, spec = torch.full(shape, 0.75), QuantSpec.parse(cast)
    found = CastError(*measure(sample_of(x, 100), [spec])[0].tolist())
    assert found.count == x.numel()
    assert x.numel() or found.sqnr_db is None


def test_zeros_tell_nothing() -> None:
    found = CastError(*measure(sample_of(torch.zeros(8, 32), 10**6), [QuantSpec("e4m3")])[0].tolist())
    assert (found.sqnr_db, found.mean_relative, found.share("underflow")) == (None, None, 0.0)


def test_a_learned_scale_is_the_one_that_was_given() -> None:
    x, spec = torch.linspace(-4, 4, 64).view(2, 32), QuantSpec("int4", quantizer=QuantizerSpec("lsq"))
    step = torch.tensor(0.5)
    found = CastError(*measure(sample_of(x, 100), [spec], [step])[0].tolist())
    values = (x / 0.5).round().clamp(-7, 7) * 0.5
    assert found.error == pytest.approx(float((values - x).double().square().sum()), rel=1e-6)
    assert found.overflow == (x.abs() / 0.5 > 7.5).sum()


def test_sums_of_calls_add_up() -> None:
    x = _uneven(64, 32)
    whole, *halves = (
        CastError(*measure(sample_of(part, 10**6), [QuantSpec("e4m3")])[0].tolist()) for part in (x, x[:32], x[32:])
    )
    both = halves[0] + halves[1]
    assert both.sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-9)
    assert both.count == whole.count
