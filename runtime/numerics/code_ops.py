"""Code ops: `encode` and `decode` as torch ops, opaque, for code that is compiled.

lp::encode, lp::decode      a compiler has no vector code for what they do bit by bit
"""

import torch
from torch import Tensor
from torch.library import Library, register_fake

from runtime.kernels.value_cast import Overflow
from runtime.numerics.casts import decode, encode
from runtime.numerics.codes import code_dtype
from runtime.numerics.formats import get_format
from runtime.numerics.specs import Rounding


def _encode(
    x: Tensor, scale: Tensor | None, format: str, rounding: Rounding | None, seed: int, step: int, stream: int,
    offset: int, overflow: Overflow,
) -> Tensor:  # fmt: skip
    return encode(x, format, rounding, scale, seed, step, stream, offset, overflow)


def _codes_shape(
    x: Tensor, scale: Tensor | None, format: str, rounding: Rounding | None, seed: int, step: int, stream: int,
    offset: int, overflow: Overflow,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape, dtype=code_dtype(get_format(format).bits))


def _values_shape(codes: Tensor, format: str) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


_OPS = Library("lp", "FRAGMENT")
_OPS.define(
    "encode(Tensor x, Tensor? scale, str format, str? rounding, int seed, SymInt step, SymInt stream, SymInt offset, "
    "str overflow) -> Tensor"
)
_OPS.define("decode(Tensor codes, str format) -> Tensor")
_OPS.impl("encode", _encode, "CompositeExplicitAutograd")
_OPS.impl("decode", decode, "CompositeExplicitAutograd")
register_fake("lp::encode", _codes_shape, lib=_OPS)
register_fake("lp::decode", _values_shape, lib=_OPS)
