"""Numbers: formats, rounding, scales, casts, counter-based random bits."""

from runtime.numerics import code_ops as code_ops  # registers its ops
from runtime.numerics.casts import decode, encode, quantize
from runtime.numerics.formats import FORMATS, get_format

__all__ = ["FORMATS", "decode", "encode", "get_format", "quantize"]
