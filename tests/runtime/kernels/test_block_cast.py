"""Block casts in C++ against the oracle, bit for bit."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from runtime.errors import FormatError
from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cast_plans import block_plan
from runtime.kernels.cpu import block_cast
from runtime.kernels.cpu.block_cast import fast_blocks
from runtime.numerics import decode, quantize
from runtime.numerics.block_casts import encode_blocks, quantize_blocks
from runtime.numerics.block_formats import BLOCK_FORMATS, BlockFormat, get_block_format
from runtime.numerics.casts import to_grid
from runtime.numerics.specs import ROUNDINGS, QuantSpec
from tests.machine_facts import needs_kernels

pytestmark = needs_kernels
RULES = ("floor", "ceil", "rceil", "even")
ALL = [*(f"{name}:scale={rule}" for name in BLOCK_FORMATS if not name.startswith("nvfp4") for rule in RULES), "nvfp4"]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal numbers, zeros of equal sign, NaN where NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(
        (((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all()
    )  # fmt: skip


def hard_blocks(columns: int) -> Tensor:
    """Random numbers in every binade; random patterns, NaN and Inf among them; zeros; blocks at both ends of fp32."""
    generator = torch.Generator().manual_seed(columns)
    patterns = torch.randint(-(2**31), 2**31, (20, columns), generator=generator).to(torch.int32).view(torch.float32)
    numbers = torch.randn(40, columns, generator=generator) * torch.exp2(torch.arange(-20.0, 20)[:, None] * 6)
    wide = torch.randn(20, columns, generator=generator) * torch.exp2(
        torch.randint(-20, 20, (20, columns), generator=generator).float()
    )
    edges = torch.tensor([448.0, math.nextafter(448, 1e9), 6.0, 3.5, 4.0, 127 / 64, 2.0**-149, 3.4e38, 2.0**-126])
    steps = torch.cat([edges[:, None].expand(9, columns) * f for f in (1.0, 0.75, -0.5)])
    special = torch.zeros(4, columns)
    special[1] = -0.0
    special[2, 3], special[3, columns // 2] = math.nan, -math.inf
    return torch.cat([patterns, numbers, wide, steps, special])


@pytest.mark.parametrize("name", ALL)
def test_equals_the_oracle_in_every_mode_and_dtype(name: str) -> None:
    for columns, mode, dtype in itertools.product(
        (128, 75, 5), ROUNDINGS, (torch.float32, torch.bfloat16, torch.float16)
    ):
        x = hard_blocks(columns).to(dtype)
        draw = {"seed": 3, "step": 2, "stream": 5, "offset": 7}
        expected = quantize_blocks(x, name, mode, **draw)
        assert same_bits(quantize(x, name, mode, **draw), expected), (columns, mode, dtype)


@pytest.mark.parametrize("amax", [3.7, 1.0, 2688.0, 1e-3, 5e30, 3e-38])
def test_the_scales_of_nvfp4_next_to_their_ties(amax: float) -> None:
    """Blocks whose scale lies within 3 fp32 of a midpoint of e4m3: any other order of operations shows there."""
    whole = torch.tensor(amax)
    grid = decode(torch.arange(126), "e4m3").double()
    ties = (grid[1:] + grid[:-1]) / 2 * 6 / (2688 / whole.double())
    near = [ties.float()]
    for _ in range(3):
        near = [near[0].nextafter(torch.tensor(0.0)), *near, near[-1].nextafter(torch.tensor(torch.inf))]
    top = torch.cat(near).clamp(max=amax)[:, None]
    x = torch.cat([top * torch.linspace(-1, 1, 16), whole.expand(1, 16)])
    assert same_bits(quantize(x, "nvfp4"), quantize_blocks(x, "nvfp4"))


@pytest.mark.parametrize("name", ["mxfp8", "mxint8", "nvfp4"])
def test_shapes_strides_and_threads(name: str) -> None:
    x = torch.randn(3, 5, 333, generator=torch.Generator().manual_seed(1))
    assert same_bits(quantize(x.transpose(0, 2), name), quantize_blocks(x.transpose(0, 2), name))
    for small in (torch.tensor(0.3), torch.randn(7), torch.empty(0, 4), torch.empty(2, 0)):
        assert same_bits(quantize(small, name), quantize_blocks(small, name))
    large, before = torch.randn(301, 1001, generator=torch.Generator().manual_seed(2)), torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([quantize(large, name, mode, seed=4) for mode in ROUNDINGS])
    torch.set_num_threads(before)
    assert all(map(same_bits, *results))
    base = quantize(large.view(-1)[: 301 * 1000], name, "stochastic", seed=4)
    at = 32 * 777
    if name != "nvfp4":  # its scale depends on the whole tensor
        part = quantize(large.view(-1)[at : 301 * 1000], name, "stochastic", seed=4, offset=at)
        assert same_bits(part, base[at:])


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "mxfp8:scale=rceil"])
def test_bf16_holds_the_values_and_says_when_it_may_not(name: str) -> None:
    row = get_block_format(name)
    plan = block_plan(row, "nearest_even")
    x = torch.randn(64, 320, generator=torch.Generator().manual_seed(1)) * 10
    narrow = fast_blocks(x, row, plan, is_divided=False, is_stochastic=False, dtype=torch.bfloat16)
    wide = fast_blocks(x, row, plan, is_divided=False, is_stochastic=False)
    assert narrow is not None
    assert wide is not None
    assert narrow.said.item() == wide.said.item() == 0
    assert torch.equal(narrow.values.float(), wide.values)
    tiny = fast_blocks(x * 2.0**-132, row, plan, is_divided=False, is_stochastic=False)
    spoiled = fast_blocks(x.masked_fill(x > 30, math.inf), row, plan, is_divided=False, is_stochastic=False)
    assert tiny is not None
    assert spoiled is not None
    assert tiny.said.item() == (2 if name.startswith("mxfp8") else 0)  # e4m3 and e5m2 have steps below 2^-6
    assert spoiled.said.item() == 1
    if name == "nvfp4":
        divisor = block_cast.fast_divisor(x, row)
        assert divisor is not None
        assert divisor == encode_blocks(x, name).tensor_scale
        assert torch.equal(wide.values / divisor, quantize(x, name))


def test_a_row_of_ones_own_takes_the_oracle() -> None:
    own = BlockFormat("mine", "e4m3", 8, "e8m0")
    assert block_plan(own, "nearest_even") is None
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    assert same_bits(quantize(x, own), quantize_blocks(x, own))
    assert quantize(x.double(), "mxfp8").dtype == torch.float64
    with pytest.raises(FormatError, match="is not a rounding"):
        quantize(x, "mxfp8", "nearest")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="step does not fit"):
        quantize(x, "mxfp8", "stochastic", step=-1)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4:scale=even", "mxint8:scale=rceil", "nvfp4"])
def test_blocks_along_columns_equal_the_oracle_on_the_transpose(name: str) -> None:
    """Ragged bands and strips, any offset of the random words, every dtype in and bf16 out."""
    for (columns, rows), offset, mode in itertools.product([(300, 113), (75, 113), (5, 36)], (0, 7, 8), ROUNDINGS):
        draw = {"seed": 3, "step": 2, "stream": 5, "offset": offset}
        hard = hard_blocks(rows).t()[:, :columns].contiguous() if columns <= 91 else torch.randn(rows, columns)
        for x in (hard, hard.bfloat16(), hard.half()) if offset == 7 else (hard,):
            spec = QuantSpec(name, mode, along="column")
            want = to_grid(x, spec, None, **draw)
            assert same_bits(fast_to_grid(x, spec, None, **draw), want.contiguous()), (columns, rows, offset, mode)
    many = torch.randn(3, 2, 50, 40, generator=torch.Generator().manual_seed(1))
    for along, mode in itertools.product(("column", "batched-column"), ROUNDINGS):
        spec = QuantSpec(name, mode, along=along)  # type: ignore[arg-type]
        want = to_grid(many, spec, None, seed=4, offset=4)
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            got = fast_to_grid(many, spec, None, seed=4, offset=4)
            torch.set_num_threads(before)
            assert same_bits(got, want.contiguous()), (along, mode)
        narrow = fast_to_grid(many, spec, None, dtype=torch.bfloat16, seed=4, offset=4)
        assert torch.equal(narrow.float(), want)


def test_a_column_cast_makes_no_copy_of_x() -> None:
    x = torch.randn(64, 96)
    assert fast_to_grid(x, QuantSpec("mxfp8", along="column"), None).is_contiguous()
    for empty in (torch.empty(0, 5), torch.empty(5, 0)):
        assert fast_to_grid(empty, QuantSpec("mxfp8", along="column"), None).shape == empty.shape
