"""Direct convolutions are the sums over matrices, bit for bit: every geometry, accumulator, range, NaN and Inf."""

from functools import partial

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import runtime.kernels.gemm  # noqa: F401, every kernel is in the registry
from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cpu.accumulate_conv import conv_library, direct
from runtime.kernels.registry import get_kernel
from runtime.numerics.specs import AccumulateSpec, GemmSpec, QuantSpec, Rounding
from runtime.ops import direct_conv
from runtime.ops.contractions import ConvGeometry
from runtime.ops.im2col import as_matrices
from tests.runtime.ops.test_im2col import convolutions

pytestmark = pytest.mark.skipif(conv_library() is None, reason="needs a C++ compiler and AVX-512")

SUMS = [
    ("hfp8-143", "dlfloat16", 64), ("dlfloat16", "dlfloat16", 64), ("1-6-9", "1-6-9", 7), ("fp16", "fp16", None),
    ("bf16", "bf16", 5), ("e5m2", "fp16", 3), ("fp32", "fp32", 4), ("e4m3", "e4m3", None), ("fp32", "1-8-14", 11),
]  # fmt: skip
SIZES = (1.0, 2.0**-9, 2.0**-16, 2.0**12)
"""Around and below the smallest values, where sums underflow, and where they saturate."""
GEOMETRIES = [
    (ConvGeometry((1, 1), (1, 1), (1, 1)), (2, 5, 9, 11), (7, 5, 3, 3)),
    (ConvGeometry((2, 2), (3, 3), (1, 1)), (2, 3, 17, 15), (70, 3, 7, 7)),  # a stem; a panel of rows that is not full
    (ConvGeometry((1, 1), (1, 1), (1, 1), 37), (2, 37, 9, 9), (37, 1, 3, 3)),  # depthwise; 37 is no number of vectors
    (ConvGeometry((2, 2), (2, 2), (1, 1), 20), (2, 20, 9, 9), (20, 1, 5, 5)),  # 25 taps are three pieces
    (ConvGeometry((1, 2), (0, 1), (2, 1), 4), (3, 8, 9, 9), (8, 2, 2, 3)),
    (ConvGeometry((2, 2), (1, 1), (1, 1), 2, (1, 0)), (2, 8, 7, 7), (8, 5, 3, 4)),
    (ConvGeometry((3,), (0,), (1,)), (2, 40, 31), (33, 40, 2)),  # positions that no tap meets
    (ConvGeometry((1, 1, 1), (1, 0, 1), (1, 1, 1)), (1, 3, 4, 5, 4), (4, 3, 3, 2, 3)),
    (ConvGeometry((1, 1), (0, 0), (1, 1)), (1, 1, 1, 1), (1, 1, 1, 1)),
    (ConvGeometry((1, 1), (0, 0), (1, 1)), (0, 3, 4, 4), (5, 3, 2, 2)),
    (ConvGeometry((1, 1), (0, 0), (1, 1)), (1, 300, 3, 3), (9, 300, 3, 3)),  # more products than a block of columns
]


def _spec(operand: str, accumulate: str, chunk: int | None, mode: Rounding | None = None) -> GemmSpec:
    return GemmSpec(QuantSpec.parse(operand), QuantSpec.parse(operand), AccumulateSpec(accumulate, chunk, mode))


def _values(shape: tuple[int, ...], size: float, operand: str, generator: torch.Generator) -> Tensor:
    """A third are zeros, as after a relu."""
    x = torch.randn(shape, generator=generator) * size
    return fast_to_grid(x * (torch.rand(shape, generator=generator) > 0.3), QuantSpec.parse(operand), None).float()


def _bits(x: Tensor) -> Tensor:
    """NaN of one kind."""
    return torch.where(x.isnan(), torch.nan, x).contiguous().view(torch.int32)


def _check(
    g: ConvGeometry, x: Tensor, w: Tensor, spec: GemmSpec, dy: Tensor | None = None, kernel: str = "cpu_accumulate"
) -> None:
    sums = direct(spec)
    assert sums is not None
    multiply = partial(get_kernel(kernel).multiply, spec=spec)
    matrices, images = as_matrices(g), as_matrices(g, sums)
    y = matrices.fwd(x, w, multiply)
    if dy is None:
        size = float(x.abs().max()) if x.numel() else 1.0
        dy = _values(tuple(y.shape), size, spec.lhs.format, torch.Generator().manual_seed(1))
    assert torch.equal(_bits(images.fwd(x, w, multiply)), _bits(y))
    assert torch.equal(_bits(images.bwd(dy, w, x.shape, multiply)), _bits(matrices.bwd(dy, w, x.shape, multiply)))
    assert torch.equal(_bits(images.grad(dy, x, w.shape, multiply)), _bits(matrices.grad(dy, x, w.shape, multiply)))


@pytest.mark.parametrize("sums", SUMS, ids=lambda each: "-".join(map(str, each)))
@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_is_the_product_of_matrices(case: int, sums: tuple[str, str, int | None]) -> None:
    g, x_shape, w_shape = GEOMETRIES[case]
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        _check(g, _values(x_shape, size, sums[0], generator), _values(w_shape, 1.0, sums[0], generator), _spec(*sums))


@pytest.mark.parametrize("sums", SUMS, ids=lambda each: "-".join(map(str, each)))
@pytest.mark.parametrize("case", [1, 2, 4])
def test_is_the_reference(case: int, sums: tuple[str, str, int | None]) -> None:
    g, x_shape, w_shape = GEOMETRIES[case]
    generator = torch.Generator().manual_seed(0)
    for size in (1.0,) if case == 1 else (1.0, 2.0**-12, 2.0**-16):
        x = _values((1, *x_shape[1:]), size, sums[0], generator)
        _check(g, x, _values(w_shape, 0.3, sums[0], generator), _spec(*sums), kernel="sequential")


@settings(max_examples=100, deadline=None)
@given(convolutions(), st.sampled_from(SUMS))
@example((ConvGeometry((1,), (0,), (2,), 1, (1,)), (2, 3, 5), (3, 2, 3)), SUMS[0])
@example((ConvGeometry((1, 1), (3, 2), (1, 1)), (1, 2, 4, 4), (3, 2, 2, 2)), SUMS[0])
@example((ConvGeometry((7,), (3,), (1,)), (2, 2, 1), (2, 2, 1)), SUMS[1])
def test_any_geometry(
    case: tuple[ConvGeometry, tuple[int, ...], tuple[int, ...]], sums: tuple[str, str, int | None]
) -> None:
    g, x_shape, w_shape = case
    generator = torch.Generator().manual_seed(0)
    x, w = _values(x_shape, 1.0, sums[0], generator), _values(w_shape, 1.0, sums[0], generator)
    more = g.output_padding or (0,) * len(g.stride)
    try:
        y = torch.convolution(x, w, None, g.stride, g.padding, g.dilation, g.is_transposed, more, g.groups)
    except RuntimeError:
        assume(False)
    assume(y.numel() > 0)
    _check(g, x, w, _spec(*sums))


@pytest.mark.parametrize("sums", SUMS, ids=lambda each: "-".join(map(str, each)))
@pytest.mark.parametrize("where", ["x", "w", "dy"])
def test_nan_and_inf(where: str, sums: tuple[str, str, int | None]) -> None:
    """Zeros of padding and of strides times Inf are NaN."""
    for case in (1, 2, 4, 5):
        g, x_shape, w_shape = GEOMETRIES[case]
        generator = torch.Generator().manual_seed(0)
        spec, x, w = _spec(*sums), _values(x_shape, 1.0, sums[0], generator), _values(w_shape, 1.0, sums[0], generator)
        y = as_matrices(g).fwd(x, w, torch.matmul)
        dy = _values(tuple(y.shape), 1.0, sums[0], generator)
        for value in (torch.inf, torch.nan):
            operands = {"x": x.clone(), "w": w.clone(), "dy": dy.clone()}
            operands[where].view(-1)[3] = value
            _check(g, operands["x"], operands["w"], spec, operands["dy"])


def test_a_negative_zero_is_that_of_all_products() -> None:
    """Underflow leaves -0, which the next zero product makes 0: a result with -0 is not made with products left out."""
    spec, g = _spec("dlfloat16", "dlfloat16", 64), ConvGeometry((2,), (0,), (1,))
    dy, w = torch.full((1, 2, 3), -(2.0**-20)), torch.full((2, 1, 2), 2.0**-20)
    sums = direct(spec)
    assert sums is not None
    assert direct_conv.input_gradient(sums, dy, w, torch.Size((6,)), g) is None
    _check(g, torch.ones(1, 1, 6), w, spec, dy)


def test_threads_change_nothing() -> None:
    g, x_shape, w_shape = GEOMETRIES[2]
    generator = torch.Generator().manual_seed(0)
    x, w = _values(x_shape, 1.0, "e4m3", generator), _values(w_shape, 1.0, "e4m3", generator)
    conv, before = as_matrices(g, direct(_spec("e4m3", "dlfloat16", 64))), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((conv.fwd(x, w, torch.matmul), conv.grad(x, x, w.shape, torch.matmul)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found))


def test_other_sums_are_left_to_matrices() -> None:
    for text in ("-> 1-6-9/8 stochastic", "-> 1-6-9 toward_zero", "-> hopper-fp8", "-> int32"):
        operand = "int8" if "int32" in text else "e4m3"
        assert direct(GemmSpec.parse(f"{operand} nearest_even * {operand} nearest_even {text} -> fp32")) is None
