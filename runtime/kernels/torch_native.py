"""The torch_native backend: torch's own GEMMs on operands that embed exactly in the dtype it multiplies in.

    method  operands in  sums in  returns  why it is right
    as_is   their dtype  fp32     dtype    no operand is cast: the op the uncompiled model runs
    fp32    fp32         fp32     fp32     every operand format embeds in fp32
    bf16    bf16         fp32     bf16     every operand format embeds in bf16, and the policy's output is bf16
    int8    int8         int32    fp32     integers below 2^31 add exactly, in any order

It serves where the cpu and cuda backends decline: without AVX512-BF16 or a compiler, for convolutions and batches.
"""

import torch
from torch import Tensor

from runtime.errors import NotSupported

NAME = "torch_native"

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "cpu_int8": torch.int8,
    "cuda_int8": torch.int8,
    "cuda_bf16": torch.bfloat16,
    "cuda_fp16": torch.float16,
    "cuda_fp8": torch.bfloat16,  # narrowed by the method; exact in both
}
"""The dtype that a method multiplies, where it is one."""


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """(..., M, K) x (..., K, N) in the operands' own dtype: bf16 rounds its fp32 sums to bf16, int8 returns int32
    sums as fp32.
    """
    if a.dtype == torch.int8:
        check_int8_sum(a.shape[-1])
        return torch._int_mm(a.contiguous(), b.contiguous() if b.stride(-1) != 1 and b.stride(0) != 1 else b).float()
    return torch.matmul(a, b)


def check_int8_sum(k: int) -> None:
    """NotSupported where a sum of k products of int8 values can leave int32."""
    if k > LONGEST_INT8_SUM:
        raise NotSupported(f"an int8 GEMM of K = {k} can overflow int32", expected=f"K <= {LONGEST_INT8_SUM}")


LONGEST_INT8_SUM = (2**31 - 1) // (128 * 128)
