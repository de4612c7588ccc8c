"""Rotate: the randomized Hadamard transform of runtime/numerics/hadamard.py, bit for bit, as a torch op.

lp::rotate_values    x turned by the transform of a cast, fp32 or bf16; float64 for float64 x

The C++ kernel serves fp32, bf16 and fp16 on the CPU; the oracle all else, and machines without a compiler.
"""

import torch
from torch import Tensor

from runtime.kernels.cpu.rotate import fast_rotate
from runtime.kernels.torch_ops import declare
from runtime.numerics.hadamard import rotate, signs_of
from runtime.numerics.random import signed_seed
from runtime.numerics.specs import QuantSpec


def rotated(x: Tensor, spec: QuantSpec, *, seed: int = 0, step: int = 0, stream: int = 0) -> Tensor:
    """x turned by the transform of `spec`, detached and contiguous; x itself where it has none. The key is that of the
    signs, where they are random.
    """
    if spec.transform is None:
        return x
    result: Tensor = torch.ops.lp.rotate_values.default(x.detach(), spec.text, signed_seed(seed), step, stream)
    return result


def _rotate(x: Tensor, spec: str, seed: int, step: int, stream: int) -> Tensor:
    parsed = QuantSpec.parse(spec)
    assert parsed.transform is not None
    signs = signs_of(parsed.transform, seed=seed, step=step, stream=stream, device=x.device)
    fast = fast_rotate(x, parsed, signs)
    return rotate(x, parsed, signs).contiguous() if fast is None else fast


def _shape(x: Tensor, spec: str, seed: int, step: int, stream: int) -> Tensor:
    parsed = QuantSpec.parse(spec)
    is_bf16 = parsed.transform is not None and parsed.transform.round == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(x.shape, dtype=dtype, device=x.device)


declare("rotate_values(Tensor x, str spec, SymInt seed, SymInt step, SymInt stream) -> Tensor", _rotate, fake=_shape)
