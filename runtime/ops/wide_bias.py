"""Wide bias: FWD of a layer in bf16 whose bias has more bits, added to the sum in fp32 before that is rounded, once.

    y = bf16(sum_k x[m,k] w[n,k] + bias[n])        x, w and y in bf16, bias in fp32

torch's own layers take a bias in the dtype of their operands, which would round it before. oneDNN takes it as it is, in
the time of torch's layer: its ops, which torch.compile's CPU code calls too, serve where it multiplies in bf16. Small
products, batches with a bias (baddbmm) and other devices are made in fp32, which has every product of bf16 values.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from runtime.kernels import cuda
from runtime.ops.contractions import AbstractContraction, Conv

SMALLEST = 1 << 19
"""Multiply-adds of a linear layer below which preparing oneDNN's product takes longer than the product in fp32."""


def bf16_with_bias(kind: AbstractContraction, lhs: Tensor, rhs: Tensor, bias: Tensor) -> Tensor:
    """FWD of bf16 operands, in bf16, with a bias of any dtype. Overflow gives Inf, as of torch's own."""
    if bias.dtype == torch.bfloat16:
        return kind.native(lhs, rhs, bias)
    bias = bias.float()
    if lhs.device.type == "cpu" and _has_bf16() and 0 not in (lhs.numel(), rhs.numel(), bias.numel()):
        if isinstance(kind, Conv):
            return _convolution(kind, lhs, rhs, bias.contiguous())
        is_layer = kind.kind in ("linear", "linear_kn") or (lhs.dim() == 2 and bias.dim() == 1)
        if is_layer and lhs.numel() * (rhs.numel() // lhs.shape[-1]) >= SMALLEST:
            w_NK = rhs if kind.kind == "linear" else rhs.t()
            return _onednn("_linear_pointwise")(lhs, w_NK, bias.expand(w_NK.shape[0]).contiguous(), *_BARE)
    if lhs.is_cuda and kind.kind in ("linear", "linear_kn") and "dtype" in torch.ops.aten.mm.overloads():
        return (kind.fwd(lhs, rhs, cuda.multiply_half) + bias).bfloat16()
    return kind.native(lhs.float(), rhs.float(), bias).bfloat16()


def _convolution(kind: Conv, lhs: Tensor, rhs: Tensor, bias: Tensor) -> Tensor:
    g, is_batched = kind.geometry, lhs.dim() == rhs.dim()
    x = lhs if is_batched else lhs.unsqueeze(0)
    if g.is_transposed:
        where = g.padding, g.output_padding, g.stride, g.dilation, g.groups
        y = _onednn("_convolution_transpose_pointwise")(x, rhs, bias, *where, *_BARE)
    else:
        y = _onednn("_convolution_pointwise")(x, rhs, bias, g.padding, g.stride, g.dilation, g.groups, *_BARE)
    return y if is_batched else y.squeeze(0)


@lru_cache(maxsize=1)
def _has_bf16() -> bool:
    """Whether oneDNN multiplies in bf16 on this CPU."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _onednn(name: str) -> Any:
    return getattr(torch.ops.mkldnn, name).default


_BARE: tuple[Any, ...] = ("none", [], "")
"""Of these ops: nothing follows the bias."""
