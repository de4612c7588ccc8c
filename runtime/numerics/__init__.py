"""Numbers, in torch alone: formats, rounding, scales, specs, codes, random bits, the reference GEMM.

Nothing here imports a kernel. The three casts of this face take one where one serves: they are those of
runtime/kernels/cast/public.py, looked up when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from runtime.numerics.formats import FORMATS, get_format

if TYPE_CHECKING:
    from runtime.kernels.cast.public import decode, encode, quantize

__all__ = ["FORMATS", "decode", "encode", "get_format", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in ("decode", "encode", "quantize"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from runtime.kernels.cast import public

    globals()[name] = getattr(public, name)
    return globals()[name]
