"""The public codes of block formats, by a kernel where one serves, else by the oracle.

runtime.numerics re-exports both. They are not differentiable.

    lp::encode_blocks, lp::decode_blocks    the same as ops, opaque
"""

import torch
from torch import Tensor

from runtime.errors import FormatError
from runtime.kernels.cast_plans import block_plan
from runtime.kernels.cpu.block_cast import fast_decode_blocks, fast_encode_blocks
from runtime.kernels.cpu.codes import can_decode, codes_on_grid, decode
from runtime.kernels.torch_ops import declare
from runtime.numerics import block_casts
from runtime.numerics.block_casts import BlockCodes
from runtime.numerics.block_formats import BlockFormat, get_block_format, is_block_format
from runtime.numerics.formats import get_format
from runtime.numerics.random import check_counter, signed_seed
from runtime.numerics.specs import Rounding


@torch.no_grad()
def encode_blocks(
    x: Tensor,
    format: str | BlockFormat,
    rounding: Rounding | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
) -> BlockCodes:
    """Codes (..., K) and scales (..., B) of what `quantize` gives on a block format, both uint8, and the tensor scale.

    The blocks lie along the last dim. In a block that holds NaN or Inf the scale is NaN and the codes are 0. Stochastic
    rounding draws as `quantize` does. Raises FormatError: x integer or complex, an unknown format or rounding.
    """
    if not x.is_floating_point():
        raise FormatError("only real numbers are quantized", expected="a floating-point tensor", got=str(x.dtype))
    if not isinstance(format, str) and not _has_a_name(format):
        return block_casts.encode_blocks(x, format, rounding, seed=seed, step=step, stream=stream, offset=offset)
    name = format if isinstance(format, str) else format.name
    return BlockCodes(*torch.ops.lp.encode_blocks(x.detach(), name, rounding, signed_seed(seed), step, stream, offset))


@torch.no_grad()
def decode_blocks(
    codes: Tensor, scales: Tensor, format: str | BlockFormat, tensor_scale: Tensor | float = 1.0
) -> Tensor:
    """The fp32 values of codes (..., K) with scales (..., B), as `encode_blocks` gave them, bit for bit `quantize`'s.

    Raises FormatError: scales of another shape, a number that is no code.
    """
    if not isinstance(format, str) and not _has_a_name(format):
        return block_casts.decode_blocks(codes, scales, format, tensor_scale)
    divisor = torch.as_tensor(tensor_scale, dtype=torch.float32, device=codes.device)
    name = format if isinstance(format, str) else format.name
    values: Tensor = torch.ops.lp.decode_blocks(codes, scales, divisor, name)
    return values


def _has_a_name(row: BlockFormat) -> bool:
    return is_block_format(row.name) and get_block_format(row.name) == row


def _encode(
    x: Tensor, format: str, rounding: Rounding | None, seed: int, step: int, stream: int, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    row = get_block_format(format)
    mode, draw = rounding or get_format(row.element).rounding, {"step": step, "stream": stream, "offset": offset}
    if mode == "stochastic":
        check_counter(**draw)
    is_narrowed = row.rule == "two_level" and x.dtype == torch.float64  # it rounds to fp32 before anything else
    given = fast_encode_blocks(
        x.float() if is_narrowed else x,
        row,
        block_plan(row, mode),
        is_stochastic=mode == "stochastic",
        seed=seed,
        **draw,
    )
    if given is None:
        codes, scales, divisor = block_casts.encode_blocks(x, row, mode, seed=seed, **draw)
        return codes.contiguous(), scales.contiguous(), divisor
    return given.codes, codes_on_grid(given.scales, row.scale), given.divisor


def _decode(codes: Tensor, scales: Tensor, tensor_scale: Tensor, format: str) -> Tensor:
    row = get_block_format(format)
    if scales.shape == block_casts.scale_shape(codes, row):
        factors = decode(scales, row.scale) if can_decode(scales, row.scale) else None
        values = None if factors is None else fast_decode_blocks(codes, factors, row, tensor_scale)
        if values is not None:
            return values
    return block_casts.decode_blocks(codes, scales, row, tensor_scale).contiguous()


def _codes_shape(
    x: Tensor, format: str, rounding: Rounding | None, seed: int, step: int, stream: int, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    scales = block_casts.scale_shape(x, get_block_format(format))
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, x.new_empty(scales, dtype=torch.uint8), x.new_empty((), dtype=torch.float32)


def _values_shape(codes: Tensor, scales: Tensor, tensor_scale: Tensor, format: str) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


declare(
    "encode_blocks(Tensor x, str format, str? rounding, SymInt seed, SymInt step, SymInt stream, SymInt offset) "
    "-> (Tensor, Tensor, Tensor)",
    _encode,
    fake=_codes_shape,
)
declare(
    "decode_blocks(Tensor codes, Tensor scales, Tensor tensor_scale, str format) -> Tensor", _decode, fake=_values_shape
)
