"""The public casts: quantize, encode, decode on any format, by a kernel where one serves, else by the oracle.

runtime.numerics re-exports them. They are not differentiable: gradients are the callers' business.

    lp::encode, lp::decode      the same as ops, opaque, for code that is compiled: a compiler has no vector code for
                                what they do bit by bit
"""

import torch
from torch import Tensor

from runtime.errors import FormatError, nearest_names
from runtime.kernels.cast.block_values import block_values
from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cast.traced import Draw, is_traced, traced_quantize
from runtime.kernels.cast.values import Overflow, fast_values, is_served, opaque_values, tiles
from runtime.kernels.cpu.codes import can_decode, can_encode, codes_on_grid
from runtime.kernels.cpu.codes import decode as decode_codes
from runtime.kernels.cpu.codes import encode as encode_cast
from runtime.kernels.cpu.contiguous import contiguous
from runtime.kernels.cpu.grid import on_grid
from runtime.kernels.cpu.philox import random_plan
from runtime.kernels.fake import has_values
from runtime.kernels.torch_ops import declare
from runtime.numerics.block_formats import BlockFormat, is_block_format
from runtime.numerics.codes import code_dtype, grid_of_codes
from runtime.numerics.format_kinds import FloatFormat, Format, IntFormat, LookupFormat
from runtime.numerics.formats import get_format, name_of
from runtime.numerics.random import check_counter, signed_seed
from runtime.numerics.range_formats import is_range_format
from runtime.numerics.specs import ROUNDINGS, QuantSpec, Rounding


@torch.no_grad()
def quantize(
    x: Tensor,
    format: str | Format | BlockFormat,
    rounding: Rounding | None = None,
    scale: Tensor | float | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    overflow: Overflow = "saturate",
    out: Tensor | None = None,
) -> Tensor:
    """round_to_grid(x / scale) * scale, in x's dtype and shape.

    rounding None is the format row's own; scale None is 1, else a number or a tensor that broadcasts against x.
    Division and multiplication are in fp32, correctly rounded (float64 x: in float64); the result is then cast to x's
    dtype, which for fp16 and bf16 x can round again or overflow.
    Saturates: beyond the largest value, Inf too, gives the largest value. overflow="ieee" gives instead what the top
    code means, Inf (ieee, p3109) or NaN (nan, merged, fnuz, e8m0); a format with neither saturates all the same, and
    toward zero a finite value gives the largest one (IEEE 754-2019, 7.4).
    Overflow is judged after rounding: 464 is 448 in e4m3, by ties to even.
    Compiled code cannot look at the values of a tensor: there a scale that is a tensor is trusted, and 0 gives NaN.
    Under torch.compile and torch.export a scalar format is cast by operations that the compiler fuses, with the same
    bits; a block format by an opaque op, lp::quantize_block_values. make_fx sees one node, lp::quantize_values.
    `out` takes the result and is returned; x's shape, dtype and device. It may be x, or share memory with x or the
    scale in any other way: what is written is what would have been without that. The memory of a large new result
    costs more than the cast (page faults), so a loop should keep one.
    No gradient passes; the op torch.ops.lp.quantize_values has the straight-through one.
    A block format makes its own scales, along the last dim, and always saturates: scale and overflow are refused. So
    they are of a range format (psq5), whose samples are x[i].
    Stochastic rounding of element i draws the word of (seed, step, stream, offset + i), i flat in C order.
    Raises FormatError: x integer or complex; scale not positive and finite; an unknown format, rounding or overflow.
    """
    if overflow not in ("saturate", "ieee"):
        raise FormatError(f'"{overflow}" is not an overflow rule', hint=nearest_names(overflow, ("saturate", "ieee")))
    _check_kinds(x, format)
    _check_rounding(rounding)
    if out is not None:
        _check_out(out, x)
    draw = Draw(seed, step, stream, offset)
    if isinstance(format, BlockFormat) or (isinstance(format, str) and is_block_format(format)):
        name = format if isinstance(format, str) else format.name
        if scale is not None:
            raise FormatError(f"{name} makes its own scales", hint="no scale argument, or a scalar format")
        if overflow != "saturate":
            raise FormatError(f"the elements of {name} saturate", hint='overflow="saturate"')
        if out is not None and not torch.compiler.is_compiling():
            return block_values(x, format, rounding, draw, out)
        return _given(block_values(x, format, rounding, draw), out)
    if isinstance(format, str) and is_range_format(format):
        if scale is not None or overflow != "saturate":
            hint = "no scale and no overflow argument, or a scalar format"
            raise FormatError(f"{format} makes its own scales, and nothing saturates", hint=hint)
        spec = QuantSpec(format, rounding or "nearest_even")
        return _given(fast_to_grid(x, spec, None, **draw._asdict()).to(x.dtype), out)
    if torch.compiler.is_compiling():
        return _given(_compiled(x, _name_of(format), rounding, scale, draw, overflow), out)
    name = format if isinstance(format, str) else name_of(format)
    mode = rounding or get_format(name).rounding
    divisor = None if scale is None else _checked_scale(scale, x)
    if overflow == "saturate" and is_served(x, name, mode, divisor):
        return fast_values(x, name, mode, divisor, draw, out)
    return _given(opaque_values(x, name, mode, divisor, draw, overflow), out)


def _compiled(
    x: Tensor, format: str, rounding: Rounding | None, scale: Tensor | float | None, draw: Draw, overflow: Overflow
) -> Tensor:
    """quantize in code that is compiled, on a scalar format: operations that fuse, or one opaque op."""
    if overflow == "saturate" and is_traced(x, format, rounding):
        return traced_quantize(x, format, rounding, scale)
    divisor = None if scale is None else _scale_tensor(scale, x)
    return opaque_values(x, format, rounding, divisor, draw, overflow)


def _name_of(format: str | Format) -> str:
    if isinstance(format, str):
        return format
    raise FormatError("in compiled code a format is given by its name", got=f"the row {format.name}", hint=format.name)


def _check_kinds(x: Tensor, format: str | Format | BlockFormat) -> None:
    if not isinstance(x, Tensor):
        raise FormatError("only tensors are cast", expected="a torch.Tensor", got=type(x).__name__, hint="torch.tensor")
    if not isinstance(format, str | FloatFormat | IntFormat | LookupFormat | BlockFormat):
        raise FormatError("not a format", expected="a name or a row", got=repr(format), hint='"e4m3"')


def _check_rounding(rounding: Rounding | None) -> None:
    if rounding is not None and rounding not in ROUNDINGS:
        raise FormatError(f'"{rounding}" is not a rounding', hint=nearest_names(rounding, ROUNDINGS))


def _given(values: Tensor, out: Tensor | None) -> Tensor:
    return values if out is None else out.copy_(values)


def _check_out(out: Tensor, x: Tensor) -> None:
    """FormatError unless `out` can hold the result."""
    for what, wanted, found in (
        ("shape", tuple(x.shape), tuple(out.shape)), ("dtype", x.dtype, out.dtype), ("device", x.device, out.device)
    ):  # fmt: skip
        if wanted != found:
            raise FormatError(
                f"out does not have the {what} of x", where="quantize", expected=str(wanted), got=str(found),
                hint="out=torch.empty_like(x)",
            )  # fmt: skip
    if out.requires_grad or any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride())):
        is_leaf = out.requires_grad
        raise FormatError(
            "out cannot be written", where="quantize", expected="a tensor of its own memory and no gradient",
            got="one that requires a gradient" if is_leaf else "one expanded from fewer elements",
            hint="out.detach()" if is_leaf else "out.contiguous()",
        )  # fmt: skip


@torch.no_grad()
def encode(
    x: Tensor,
    format: str | Format,
    rounding: Rounding | None = None,
    scale: Tensor | float | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    overflow: Overflow = "saturate",
) -> Tensor:
    """The codes of quantize's grid values: sign, exponent, fraction from the top bit down; integers two's complement;
    lookup formats the index in their table. For a block format: `encode_blocks`.

    uint8 for formats of up to 8 bits, else int32 up to 31 bits, else int64; unused high bits are zero, so
    0 <= code < 2^bits. decode(encode(v)) == v for every v on the grid, -0 included. NaN takes the one NaN code whose
    fraction is all ones, sign kept; a format that has no NaN code raises FormatError, as an integer format does.
    """
    _check_kinds(x, format)
    _check_rounding(rounding)
    is_compiling = torch.compiler.is_compiling()
    divisor = None if scale is None else _scale_tensor(scale, x) if is_compiling else _checked_scale(scale, x)
    name = _scalar_name(format, "encode_blocks")
    codes: Tensor = torch.ops.lp.encode(
        x.detach(), divisor, name, rounding, signed_seed(seed), step, stream, offset, overflow
    )
    return codes


@torch.no_grad()
def decode(codes: Tensor, format: str | Format) -> Tensor:
    """The fp32 values of codes 0 <= code < 2^bits (any integer dtype), by the equations of format_kinds.py: encode
    undone.

    Every NaN code gives NaN; codes a format without subnormals does not use give zero. int32 values above 2^24 are
    rounded to fp32.
    """
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise FormatError("codes are integers", where="decode", expected="an integer tensor", got=str(codes.dtype))
    values: Tensor = torch.ops.lp.decode(codes, _scalar_name(format, "decode_blocks"))
    return values


def _scalar_name(format: str | Format, instead: str) -> str:
    if isinstance(format, str) and is_block_format(format):
        raise FormatError(f'"{format}" has codes and scales', hint=f"runtime.numerics.{instead}")
    if isinstance(format, str) or torch.compiler.is_compiling():
        return _name_of(format)
    return name_of(format)


def _scale_tensor(scale: Tensor | float, x: Tensor) -> Tensor:
    """The scale in the working dtype; FormatError unless it is real and broadcasts to x."""
    if isinstance(scale, complex) or (isinstance(scale, Tensor) and scale.is_complex()):
        raise FormatError("a scale is a real number", expected="0 < scale < Inf", got="a complex one")
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensor = torch.as_tensor(scale, dtype=working, device=x.device)
    pairs = zip(reversed(tensor.shape), reversed(x.shape))
    if tensor.ndim > x.ndim or any(size not in (1, whole) for size, whole in pairs):
        raise FormatError("the scale does not broadcast to x", expected=str((*x.shape,)), got=str((*tensor.shape,)))
    return tensor


def _checked_scale(scale: Tensor | float, x: Tensor) -> Tensor:
    """The scale as a tensor in the working dtype; FormatError unless every element is positive and finite, as far as
    its values are there: a graph that is traced has none.
    """
    tensor = _scale_tensor(scale, x)
    if not has_values(tensor):
        return tensor
    if not bool((tensor.isfinite() & (tensor > 0)).all()):
        raise FormatError("a scale divides and must not be zero, negative, Inf or NaN", expected="0 < scale < Inf")
    return tensor


def _encode(
    x: Tensor, scale: Tensor | None, format: str, rounding: Rounding | None, seed: int, step: int, stream: int,
    offset: int, overflow: Overflow,
) -> Tensor:  # fmt: skip
    row = get_format(format)
    mode = rounding or row.rounding
    if overflow == "saturate" and x.is_cpu and is_served(x, format, mode, scale) and can_encode(format, mode):
        if mode == "stochastic":
            check_counter(step, stream, offset)
        random = random_plan(seed, step, stream, offset) if mode == "stochastic" else None
        factors, tile = (None, (1, 1)) if scale is None else tiles(scale, x.shape)
        return encode_cast(contiguous(x), format, mode, factors, tile, random)
    return codes_on_grid(on_grid(x, format, mode, scale, seed, step, stream, offset, overflow), format).contiguous()


def _decode(codes: Tensor, format: str) -> Tensor:
    if can_decode(codes, format):
        return decode_codes(codes, format)
    return grid_of_codes(codes, get_format(format)).contiguous()


def _codes_shape(
    x: Tensor, scale: Tensor | None, format: str, rounding: Rounding | None, seed: int, step: int, stream: int,
    offset: int, overflow: Overflow,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape, dtype=code_dtype(get_format(format).bits))


def _values_shape(codes: Tensor, format: str) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


declare(
    "encode(Tensor x, Tensor? scale, str format, str? rounding, SymInt seed, SymInt step, SymInt stream, "
    "SymInt offset, str overflow) -> Tensor",
    _encode,
    fake=_codes_shape,
)
declare("decode(Tensor codes, str format) -> Tensor", _decode, fake=_values_shape)
