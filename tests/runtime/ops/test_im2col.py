"""Convolutions as matrix products, against torch where the order of additions does not matter."""

from functools import partial

import pytest
import torch

from runtime.kernels.cpu.accumulate import accumulate_library
from runtime.kernels.registry import get_kernel
from runtime.numerics import quantize
from runtime.numerics.reference_gemm import RandomKey
from runtime.numerics.specs import GemmSpec
from runtime.ops.contractions import ConvGeometry
from runtime.ops.im2col import unfolded

GEOMETRIES = [
    (ConvGeometry((2,), (3,), (2,)), (2, 4, 17), 6, (3,)),
    (ConvGeometry((1, 2), (0, 1), (1, 1), 2), (2, 4, 7, 8), 6, (3, 2)),
    (ConvGeometry((2, 3), (2, 0), (2, 1), 4), (1, 4, 9, 10), 4, (2, 3)),
    (ConvGeometry((1, 2, 1), (1, 0, 2), (1, 1, 2)), (2, 2, 5, 6, 5), 3, (2, 3, 2)),
    (ConvGeometry((1, 1), (3, 2), (1, 1)), (1, 2, 4, 4), 3, (2, 2)),  # padding beyond the kernel: dy is cropped
]


@pytest.mark.parametrize(("geometry", "shape", "channels", "kernel"), GEOMETRIES)
def test_is_the_convolution(
    geometry: ConvGeometry, shape: tuple[int, ...], channels: int, kernel: tuple[int, ...]
) -> None:
    """Small integers, exact in any order."""
    x = torch.randint(-3, 4, shape).double().requires_grad_()
    w = torch.randint(-3, 4, (channels, shape[1] // geometry.groups, *kernel)).double().requires_grad_()
    zeros = (0,) * len(kernel)
    y = torch.convolution(
        x, w, None, geometry.stride, geometry.padding, geometry.dilation, False, zeros, geometry.groups
    )
    dy = torch.randint(-3, 4, y.shape).double()
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    conv = unfolded(geometry)
    assert torch.equal(conv.fwd(x, w, torch.matmul), y)
    assert torch.equal(conv.bwd(dy, w, x.shape, torch.matmul), dx)
    assert torch.equal(conv.grad(dy, x, w.shape, torch.matmul), dw)


@pytest.mark.parametrize("output_padding", [(), (1, 0)])
def test_one_sample_without_a_batch_dim(output_padding: tuple[int, ...]) -> None:
    geometry = ConvGeometry((2, 3), (1, 0), (1, 2), 2, output_padding)
    x, w = torch.randn(4, 7, 8), torch.randn(4, 2, 3, 2)
    conv = unfolded(geometry)
    y = conv.fwd(x[None], w, torch.matmul)
    dy = torch.randn(y.shape)
    assert torch.equal(conv.fwd(x, w, torch.matmul), y[0])
    dx = conv.bwd(dy, w, x[None].shape, torch.matmul)
    assert torch.equal(conv.bwd(dy[0], w, x.shape, torch.matmul), dx[0])
    dw = conv.grad(dy, x[None], w.shape, torch.matmul)
    assert torch.equal(conv.grad(dy[0], x, w.shape, torch.matmul), dw)


@pytest.mark.parametrize("groups", [1, 2])
def test_is_the_transposed_convolution(groups: int) -> None:
    geometry = ConvGeometry((2, 3), (1, 0), (1, 2), groups, (1, 0))
    x = torch.randint(-3, 4, (2, 4, 5, 6)).double().requires_grad_()
    w = torch.randint(-3, 4, (4, 3, 3, 2)).double().requires_grad_()
    y = torch.convolution(x, w, None, (2, 3), (1, 0), (1, 2), True, (1, 0), groups)
    dy = torch.randint(-3, 4, y.shape).double()
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    conv = unfolded(geometry)
    assert torch.equal(conv.fwd(x, w, torch.matmul), y)
    assert torch.equal(conv.bwd(dy, w, x.shape, torch.matmul), dx)
    assert torch.equal(conv.grad(dy, x, w.shape, torch.matmul), dw)


@pytest.mark.skipif(accumulate_library() is None, reason="needs a C++ compiler and AVX-512")
def test_stochastic_sums_are_those_of_the_reference() -> None:
    torch.manual_seed(0)
    spec = GemmSpec.parse("e4m3 nearest_even * e4m3 nearest_even -> 1-6-9/8 stochastic -> fp32")
    x, w = quantize(torch.randn(2, 4, 6, 5), "e4m3"), quantize(torch.randn(6, 2, 3, 3), "e4m3")
    conv, key = unfolded(ConvGeometry((1, 1), (1, 1), (1, 1), 2)), RandomKey(3, 1, 5)
    kernels = [get_kernel(name) for name in ("cpu_accumulate", "sequential")]
    sums = [conv.fwd(x, w, partial(kernel.multiply, spec=spec, key=key)) for kernel in kernels]
    assert torch.equal(*sums)
