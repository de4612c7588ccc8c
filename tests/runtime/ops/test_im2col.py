"""Convolutions as matrix products, against torch where the order of additions does not matter."""

from functools import partial

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import runtime.kernels.gemm  # noqa: F401, every kernel is in the registry
from runtime.kernels.cpu.accumulate import accumulate_library
from runtime.kernels.registry import get_kernel
from runtime.numerics import quantize
from runtime.numerics.reference_gemm import RandomKey
from runtime.numerics.specs import GemmSpec
from runtime.ops.contractions import ConvGeometry
from runtime.ops.im2col import as_matrices


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[ConvGeometry, tuple[int, ...], tuple[int, ...]]:
    """A geometry, the shape of x and that of w, as far as torch accepts them: an output padding is smaller than the
    stride or the dilation.
    """
    ndim, is_transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.sampled_from((1, 2)))
    most = (9, 5, 4)[ndim - 1]
    dims = [
        (draw(st.integers(1, 4)), draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3)),
         draw(st.integers(1, most))) for _ in range(ndim)
    ]  # fmt: skip
    stride, padding, dilation, kernel, size = (tuple(column) for column in zip(*dims))
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation)) if is_transposed else ()
    x = (draw(st.integers(1, 3)), 2 * groups, *size)
    w = (2 * groups, 3, *kernel) if is_transposed else (3 * groups, 2, *kernel)
    return ConvGeometry(stride, padding, dilation, groups, more), x, w


@settings(max_examples=300, deadline=None)
@given(convolutions())
@example((ConvGeometry((1,), (0,), (2,), 1, (1,)), (2, 3, 5), (3, 2, 3)))  # room for a position that x does not have
@example((ConvGeometry((1, 1), (3, 2), (1, 1)), (1, 2, 4, 4), (3, 2, 2, 2)))  # padding beyond the kernel: dy is cropped
@example((ConvGeometry((7,), (3,), (1,)), (2, 2, 1), (2, 2, 1)))  # and nothing of it is left
@example((ConvGeometry((2,), (3,), (2,)), (2, 4, 17), (6, 4, 3)))
def test_is_the_convolution(case: tuple[ConvGeometry, tuple[int, ...], tuple[int, ...]]) -> None:
    """Small integers, exact in any order."""
    g, x_shape, w_shape = case
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-3, 4, shape, generator=generator).double() for shape in (x_shape, w_shape))
    x.requires_grad_(), w.requires_grad_()
    more = g.output_padding or (0,) * len(g.stride)
    try:
        y = torch.convolution(x, w, None, g.stride, g.padding, g.dilation, g.is_transposed, more, g.groups)
    except RuntimeError:
        assume(False)
    assume(y.numel() > 0)
    dy = torch.randint(-3, 4, y.shape, generator=generator).double()
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    conv = as_matrices(g)
    assert torch.equal(conv.fwd(x, w, torch.matmul), y)
    assert torch.equal(conv.bwd(dy, w, x.shape, torch.matmul), dx)
    assert torch.equal(conv.grad(dy, x, w.shape, torch.matmul), dw)


@pytest.mark.parametrize("output_padding", [(), (1, 0)])
def test_one_sample_without_a_batch_dim(output_padding: tuple[int, ...]) -> None:
    geometry = ConvGeometry((2, 3), (1, 0), (1, 2), 2, output_padding)
    x, w = torch.randn(4, 7, 8), torch.randn(4, 2, 3, 2)
    conv = as_matrices(geometry)
    y = conv.fwd(x[None], w, torch.matmul)
    dy = torch.randn(y.shape)
    assert torch.equal(conv.fwd(x, w, torch.matmul), y[0])
    dx = conv.bwd(dy, w, x[None].shape, torch.matmul)
    assert torch.equal(conv.bwd(dy[0], w, x.shape, torch.matmul), dx[0])
    dw = conv.grad(dy, x[None], w.shape, torch.matmul)
    assert torch.equal(conv.grad(dy[0], x, w.shape, torch.matmul), dw)


@pytest.mark.skipif(accumulate_library() is None, reason="needs a C++ compiler and AVX-512")
def test_stochastic_sums_are_those_of_the_reference() -> None:
    torch.manual_seed(0)
    spec = GemmSpec.parse("e4m3 nearest_even * e4m3 nearest_even -> 1-6-9/8 stochastic -> fp32")
    x, w = quantize(torch.randn(2, 4, 6, 5), "e4m3"), quantize(torch.randn(6, 2, 3, 3), "e4m3")
    conv, key = as_matrices(ConvGeometry((1, 1), (1, 1), (1, 1), 2)), RandomKey(3, 1, 5)
    kernels = [get_kernel(name) for name in ("cpu_accumulate", "sequential")]
    sums = [conv.fwd(x, w, partial(kernel.multiply, spec=spec, key=key)) for kernel in kernels]
    assert torch.equal(*sums)
