"""Numbers, in torch alone: formats, rounding, scales, specs, codes, random bits, the reference GEMM.

Nothing here imports a kernel. The casts of this face take one where one serves: they are those of
runtime/kernels/cast/public.py and block_codes.py, looked up when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from runtime.numerics.formats import FORMATS, get_format

if TYPE_CHECKING:
    from runtime.kernels.cast.block_codes import decode_blocks, encode_blocks
    from runtime.kernels.cast.public import decode, encode, quantize

__all__ = ["FORMATS", "decode", "decode_blocks", "encode", "encode_blocks", "get_format", "quantize"]

_FILES = dict.fromkeys(("decode", "encode", "quantize"), "public") | dict.fromkeys(
    ("decode_blocks", "encode_blocks"), "block_codes"
)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"runtime.kernels.cast.{_FILES[name]}"), name)
    return globals()[name]
