"""Rotations and the rules of nvfp4 in C++: bit for bit the oracle's."""

import itertools

import pytest
import torch
from torch import Tensor

from runtime.kernels.cast.block_grid import fast_block_cast
from runtime.kernels.cast.block_values import block_values
from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cast.rotate import rotated
from runtime.kernels.cast.scales import compute_scale as fast_scale
from runtime.kernels.cast.traced import Draw
from runtime.kernels.cast_plans import block_plan, corrected_plan
from runtime.kernels.cpu.block_cast import fast_blocks, fast_divisor
from runtime.kernels.cpu.rotate import fast_rotate
from runtime.numerics.block_casts import quantize_blocks
from runtime.numerics.block_formats import get_block_format
from runtime.numerics.casts import to_grid
from runtime.numerics.hadamard import rotate, signs_of
from runtime.numerics.scaling import compute_scale
from runtime.numerics.specs import Along, QuantSpec
from tests.machine_facts import needs_compiler
from tests.runtime.kernels.test_cast import same_bits

SHAPES = [(7, 40), (40, 17), (3, 7, 40), (1, 1), (2, 300, 70), (130, 16), (33, 260), (257, 33), (5,)]
RULES = ("nvfp4", "nvfp4:scale=headroom", "nvfp4:scale=four-six", "nvfp4:scale=eden", "nvfp4-2d")
WAYS: tuple[Along, ...] = ("row", "column", "batched-column")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _spec(format: str, rounding: str, along: Along) -> QuantSpec:
    if format == "nvfp4-2d":
        return QuantSpec(format, rounding)  # type: ignore[arg-type]
    return QuantSpec.parse(f"{format} {rounding} {along}{' hadamard128[random]' if 'eden' in format else ''}")


def _hard(shape: tuple[int, ...], poison: float | None) -> Tensor:
    source = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=source) * torch.randn(shape, generator=source).exp()
    x[..., :1] = 0
    x.view(-1)[::7] *= -0.0
    if poison is not None:
        x.view(-1)[x.numel() // 2] = poison
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_are_the_oracles(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = _hard(shape, None).to(dtype)
    for along, size, rest in itertools.product(WAYS, (16, 32, 64, 128), ("[random]", "[bf16]")):
        if along != "row" and x.dim() < 2:
            continue
        spec = QuantSpec.parse(f"mxfp4 nearest_even {along} hadamard{size}{rest}")
        assert spec.transform is not None
        signs = signs_of(spec.transform, seed=3, step=1, stream=2)
        wanted = rotate(x, spec, signs)
        found = rotated(x, spec, seed=3, step=1, stream=2)
        assert found.is_contiguous()
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), (along, size, rest)


def test_rotations_of_strided_and_large_tensors() -> None:
    spec = QuantSpec.parse("mxfp4 nearest_even column hadamard64[random]")
    for x in (torch.randn(300, 400).t(), torch.randn(40, 50, 60)[:, ::2], torch.randn(600, 100) * 3e38):
        assert spec.transform is not None
        wanted = rotate(x, spec, signs_of(spec.transform))
        assert torch.equal(rotated(x, spec).nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("poison", [None, torch.nan, -torch.inf])
@pytest.mark.parametrize("format", RULES)
def test_casts_are_the_oracles(shape: tuple[int, ...], poison: float | None, format: str) -> None:
    for dtype, along, rounding in itertools.product(DTYPES, WAYS, ("nearest_even", "stochastic", "toward_zero")):
        x = _hard(shape, poison).to(dtype)
        if along != "row" and x.dim() < 2:
            continue
        spec, key = _spec(format, rounding, along), {"seed": 5, "step": 2, "stream": 9}
        found = fast_to_grid(x, spec, None, dtype=torch.bfloat16, **key)
        assert same_bits(found.float(), to_grid(x, spec, None, **key)), (dtype, along, rounding)
        assert torch.equal(fast_scale(x, spec), compute_scale(x, spec))  # type: ignore[arg-type]
        if along == "row":
            values = block_values(x.float(), format, rounding, Draw(3, 0, 0, 5))  # type: ignore[arg-type]
            assert same_bits(values, quantize_blocks(x.float(), format, rounding, seed=3, offset=5))  # type: ignore[arg-type]


@needs_compiler
def test_it_was_the_kernel() -> None:
    x = torch.randn(40, 130)
    for format, rounding, is_column in itertools.product(RULES, ("nearest_even", "stochastic"), (False, True)):
        row = get_block_format(format)
        plan = block_plan(row, rounding)  # type: ignore[arg-type]
        is_left = rounding == "stochastic" and format in ("nvfp4-2d", "nvfp4:scale=four-six")
        assert (plan is None) is is_left
        found = fast_blocks(
            x, row, plan, is_divided=False, is_stochastic=rounding == "stochastic", is_column=is_column,
            corrected=corrected_plan(row, rounding),  # type: ignore[arg-type]
        )  # fmt: skip
        assert (found is None) is is_left
        assert fast_divisor(x, row, is_column) is not None
    spec = QuantSpec.parse("mxfp4 nearest_even row hadamard16")
    assert spec.transform is not None
    assert fast_rotate(x, spec, signs_of(spec.transform)) is not None


@needs_compiler
def test_threads_change_no_bit() -> None:
    threads = torch.get_num_threads()
    x, found = torch.randn(500, 300), []
    for count in (1, 3):
        torch.set_num_threads(count)
        for along in WAYS:
            spec = QuantSpec.parse(f"nvfp4:scale=eden stochastic {along} hadamard128[random]")
            found.append(fast_to_grid(rotated(x, spec, seed=1), spec, None, dtype=torch.bfloat16, seed=4))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))


@pytest.mark.parametrize("format", ["mxfp4:scale=rceil", "mxfp8", *RULES[:4]])
@pytest.mark.parametrize("transform", ["hadamard16[random,bf16]", "hadamard32", "hadamard128[random]", ""])
def test_one_op_is_rotation_scale_and_cast(format: str, transform: str) -> None:
    """What is turned in a cache is what would be turned in memory."""
    for shape, dtype, poison in itertools.product(SHAPES[2:6], DTYPES[:2], (None, torch.nan)):
        x = _hard(shape, poison).to(dtype)
        for along, rounding in itertools.product(WAYS, ("nearest_even", "stochastic")):
            if (along != "row" and x.dim() < 2) or ("eden" in format and transform != "hadamard128[random]"):
                continue
            spec = QuantSpec.parse(f"{format} {rounding} {along} {transform}")
            key = {"seed": 5, "step": 2, "stream": 9}
            found, scale, is_bad = fast_block_cast(x, spec, dtype=torch.bfloat16, signs=4, **key)
            y = rotated(x, spec, seed=5, step=2, stream=4)
            wanted = fast_to_grid(y, spec, None, dtype=torch.bfloat16, **key)
            assert found.dtype == wanted.dtype
            assert same_bits(found.float(), wanted.float()), (shape, dtype, spec.text)
            of_tensor = compute_scale(y, spec)
            assert (scale is None) is (of_tensor is None)
            assert of_tensor is None or torch.equal(scale, of_tensor)  # type: ignore[arg-type]
            assert is_bad is bool(~x.isfinite().all())
