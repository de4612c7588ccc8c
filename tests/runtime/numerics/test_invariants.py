"""What holds for every cast, one property a test: idempotence, order, sign, error bounds, chance, zeros, and refusals.

Through `fast_to_grid` and `quantize`, so in C++ where it serves; that this equals the oracle is tested apart.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.errors import FormatError
from runtime.kernels.cast.grid import fast_to_grid
from runtime.numerics import FORMATS, encode, get_format, quantize
from runtime.numerics.block_casts import encode_blocks
from runtime.numerics.block_formats import BLOCK_FORMATS
from runtime.numerics.format_kinds import FloatFormat, IntFormat, LookupFormat
from runtime.numerics.grid import neighbours
from runtime.numerics.random import random_bits
from runtime.numerics.scaling import compute_scale, expand_scale
from runtime.numerics.specs import GRANULARITIES, QuantSpec, Rounding, ScaleSpec

DETERMINISTIC: tuple[Rounding, ...] = ("nearest_even", "nearest_away", "toward_zero")
SCALARS = [*FORMATS, "1-6-9", "int5", "int8:range=full", "pow2:bits=5,max=2", "1-5-2:subnormals=no"]
RULES = [f"{name}:scale={rule}" for name in ("mxfp8", "mxfp8-e5m2", "mxfp6", "mxfp6-e3m2", "mxfp4", "mxint8")
         for rule in ("floor", "ceil", "rceil", "even")]  # fmt: skip
numbers = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70)
formats, modes = st.sampled_from(SCALARS), st.sampled_from(DETERMINISTIC)


def cast(x: Tensor, name: str, mode: Rounding, scale: Tensor | None = None) -> Tensor:
    return fast_to_grid(x, QuantSpec(name, mode, None if scale is None else ScaleSpec()), scale)


def is_defined(name: str, mode: Rounding) -> bool:
    return (name, mode) != ("int1", "toward_zero")


@settings(max_examples=300, deadline=None)
@given(formats, modes, numbers)
def test_idempotence(name: str, mode: Rounding, values: list[float]) -> None:
    if is_defined(name, mode):
        once = cast(torch.tensor(values), name, mode)
        for again in DETERMINISTIC:
            assert not is_defined(name, again) or torch.equal(cast(once, name, again), once)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["e4m3", "e5m2", "1-6-9", "e2m1", "int8", "int4", "fp16", "pow2"]), modes,
    st.sampled_from(GRANULARITIES), st.lists(st.floats(-1e4, 1e4, width=32), min_size=24, max_size=24),
)  # fmt: skip
def test_idempotence_under_a_scale_that_is_a_power_of_two(
    name: str, mode: Rounding, granularity: str, values: list[float]
) -> None:
    """Of values; the scale may halve when the largest magnitude was rounded down. Under amax the second scale can be
    one fp32 off, and values with it. A power of two below 2^-126 does not become a scale.
    """
    x = torch.tensor(values).view(4, 6)
    x = torch.where(x.abs() < 2.0**-60, 0.0, x)
    spec = QuantSpec.parse(f"{name} {mode} {granularity + ('[2,3]' if granularity == 'block' else '')}/pow2")

    def quantized(x: Tensor) -> Tensor:
        scale = compute_scale(x, spec)
        assert scale is not None
        return fast_to_grid(x, spec, scale) * expand_scale(scale, x.shape, spec)

    once = quantized(x)
    assert torch.equal(quantized(once), once)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(RULES), numbers, st.integers(-30, 30))
def test_idempotence_of_blocks(name: str, values: list[float], shift: int) -> None:
    """Values, not scales: rceil may halve a scale whose amax was rounded down."""
    once = quantize(torch.tensor(values) * 2.0**shift, name)
    assert torch.equal(quantize(once, name), once)


@settings(max_examples=100, deadline=None)
@given(numbers)
def test_idempotence_of_nvfp4_up_to_the_rounding_of_its_scales(values: list[float]) -> None:
    """Of tensors above 2^-100: from 448 * 6 / FLT_MAX = 2^-116.6 down, S is cut to FLT_MAX and the scales run low."""
    x = torch.tensor(values)
    assume(not 0 < float(x.abs().max()) < 2.0**-100)
    once = quantize(x, "nvfp4")
    again = quantize(once, "nvfp4")
    assert torch.allclose(again, once, rtol=1e-5, atol=float(once.abs().max()) * 1e-5)


@settings(max_examples=300, deadline=None)
@given(formats, modes, numbers)
def test_order_is_kept(name: str, mode: Rounding, values: list[float]) -> None:
    if is_defined(name, mode) and name != "e8m0":
        q = cast(torch.tensor(sorted(values)), name, mode)
        assert bool((q.diff() >= 0).all())


@settings(max_examples=300, deadline=None)
@given(formats, modes, numbers)
def test_sign_symmetry(name: str, mode: Rounding, values: list[float]) -> None:
    row = get_format(name)
    is_symmetric = not isinstance(row, LookupFormat) or set(row.grid) == {-value for value in row.grid}
    is_symmetric &= row.min == -row.max
    if is_symmetric and name != "int1":  # without a zero, the tie at 0 has to go to one side
        x = torch.tensor(values)
        assert torch.equal(cast(-x, name, mode), -cast(x, name, mode))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([name for name in SCALARS if not isinstance(get_format(name), LookupFormat)]),
       st.sampled_from([*DETERMINISTIC, "stochastic"]), numbers)  # fmt: skip
def test_error_bounds(name: str, mode: Rounding, values: list[float]) -> None:
    """In range: at most half the distance of the two neighbours for nearest, less than all of it otherwise."""
    row = get_format(name)
    assert isinstance(row, FloatFormat | IntFormat)
    x = torch.tensor(values)
    for v, q in zip(x.tolist(), cast(x, name, mode).tolist()):
        below, above = neighbours(v, row)
        if below is not None and above is not None:
            gap, error = above - below, abs(q - v)
            assert q in (below, above)
            assert error <= gap / 2 if mode.startswith("nearest") else error < gap or gap == 0


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["e4m3", "e5m2", "dlfloat16", "int4", "nf4", "fp4-radix4"]), st.floats(-5, 5, width=32),
       st.integers(0, 2**32))  # fmt: skip
def test_chance_gives_the_neighbours_with_the_right_mean(name: str, value: float, seed: int) -> None:
    draws, row = 4000, get_format(name)
    x = torch.full((draws,), value)
    q = fast_to_grid(x, QuantSpec(name, "stochastic"), None, seed=seed).double()
    below, above = neighbours(x[0].item(), row)
    if below is None or above is None:
        assert q.unique().tolist() == [row.max if value > 0 else row.min]
        return
    assert set(q.unique().tolist()) <= {below, above}
    if above == below:  # what is representable stays
        return
    share = (x[0].item() - below) / (above - below)
    tolerance = 5 * (above - below) * math.sqrt(max(share * (1 - share), 1 / draws) / draws)
    assert abs(q.mean().item() - x[0].item()) <= tolerance


@pytest.mark.parametrize("rule", ["amax", "pow2"])
@pytest.mark.parametrize("name", ["e4m3", "e2m1", "int8", "nf4", "dlfloat16"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rows_of_zeros_stay_zeros(granularity: str, name: str, rule: str) -> None:
    spec = QuantSpec.parse(f"{name} nearest_even {granularity + ('[2,3]' if granularity == 'block' else '')}/{rule}")
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    x[2], x[:, 4], x[4:, 6:] = 0.0, 0.0, 0.0
    for each in (x, torch.zeros(6, 9)):
        scale = compute_scale(each, spec)
        assert scale is not None
        value = fast_to_grid(each, spec, scale) * expand_scale(scale, each.shape, spec)
        assert bool(value.isfinite().all())
        assert bool((value[each == 0] == 0).all())


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_of_zeros_stay_zeros(name: str) -> None:
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    x[1], x[0, 32:64] = 0.0, 0.0
    for each in (x, torch.zeros(3, 96)):
        assert bool((quantize(each, name)[each == 0] == 0).all())
        assert bool(quantize(each, name).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_only_real_numbers_are_cast(dtype: torch.dtype) -> None:
    x = torch.ones(4, 4, dtype=dtype)
    for call in (
        lambda: quantize(x, "e4m3"),
        lambda: quantize(x, "mxfp8"),
        lambda: encode(x, "e4m3"),
        lambda: encode_blocks(x, "nvfp4"),
        lambda: fast_to_grid(x, QuantSpec("e4m3"), None),
        lambda: fast_to_grid(x, QuantSpec("mxfp8"), None),
        lambda: compute_scale(x, QuantSpec.parse("e4m3 nearest_even row/amax")),
        lambda: compute_scale(x, QuantSpec("nvfp4")),
    ):
        with pytest.raises(FormatError, match="real numbers"):
            call()


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, math.inf, math.nan, [1.0, 0.0, 2.0]])
@pytest.mark.parametrize("call", [quantize, encode])
def test_a_scale_that_is_not_positive_and_finite_is_refused(call, scale: object) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FormatError, match="0 < scale < Inf"):
        call(torch.ones(2, 3), "e4m3", scale=torch.tensor(scale))


@pytest.mark.parametrize("text", ["e4m3", "nf4", "uint8", "int8:range=full", "e4m3 stochastic", "nf4 stochastic"])
@pytest.mark.parametrize("offset", [1, 4, 4099])
def test_a_slice_with_its_offset_has_the_bits_of_its_base(text: str, offset: int) -> None:
    spec, x = QuantSpec.parse(text), torch.randn(20_000, generator=torch.Generator().manual_seed(3)) * 3
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        base = fast_to_grid(x.repeat(4), spec, None, seed=5, step=1, stream=2)
        part = fast_to_grid(x[offset:15_000], spec, None, seed=5, step=1, stream=2, offset=offset)
        assert torch.equal(part, base[offset:15_000])
        results.append(base)
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize(("name", "dtype"), [
    *((name, torch.bfloat16) for name in ("e4m3", "e5m2", "hfp8-143", "e2m1", "int8", "uint8", "bf16", "fp4-radix4")),
    *((name, torch.float16) for name in ("fp16", "e4m3", "e2m1")),
    *((name, torch.int8) for name in ("int8", "int4", "ternary")),
])  # fmt: skip
def test_a_narrow_dtype_holds_the_same_values(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.cat([torch.randn(9000, generator=generator) * torch.exp2(torch.randint(-30, 20, (9000,)).float()),
                   torch.tensor([math.inf, -math.inf, 0.0, -0.0])])  # fmt: skip
    if dtype != torch.int8:
        x = torch.cat([x, torch.tensor([math.nan])])
    for mode in ("nearest_even", "stochastic"):
        spec = QuantSpec(name, mode)
        got, wide = fast_to_grid(x, spec, None, dtype=dtype, seed=1), fast_to_grid(x, spec, None, seed=1)
        assert got.dtype == dtype
        assert torch.equal(got.float().nan_to_num(7.5), wide.nan_to_num(7.5))
        assert dtype == torch.int8 or torch.equal(got.signbit(), wide.signbit())


def test_random_words_are_those_of_the_flat_index() -> None:
    whole = random_bits(1000, seed=1, step=2, stream=3)
    assert torch.equal(random_bits(500, seed=1, step=2, stream=3, offset=123), whole[123:623])
