"""Slow paths: a site whose product falls to the reference, for many products, says so once, with the reason."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

from torch import Tensor

from runtime.errors import NotSupported, SlowPathWarning
from runtime.kernels.registry import AbstractKernel, choose
from runtime.kernels.request import GemmRequest
from runtime.numerics import reference_gemm
from runtime.numerics.specs import GemmSpec, Role
from runtime.ops.contractions import Multiply

_SITE: ContextVar[str] = ContextVar("site", default="")


@contextmanager
def site_named(name: str | None) -> Iterator[None]:
    """Whose product runs inside; the text of a torch op has no name."""
    token = _SITE.set(name or "")
    try:
        yield
    finally:
        _SITE.reset(token)


def is_slow(kernel: AbstractKernel) -> bool:
    """Whether it is the reference."""
    return kernel.backend == "reference"


def telling(multiply: Multiply, site: int, kind: str, role: Role, spec: GemmSpec) -> Multiply:
    """`multiply`, the reference's, with one SlowPathWarning a site and role where there are many products."""

    def told(lhs: Tensor, rhs: Tensor) -> Tensor:
        count = lhs.numel() * rhs.shape[-1]
        if count > reference_gemm.MANY_PRODUCTS:
            _tell(_SITE.get() or f"site {site}", kind, role, spec, lhs.device.type)
        with reference_gemm.without_warning():
            return multiply(lhs, rhs)

    return told


@lru_cache(maxsize=2**16)
def _tell(site: str, kind: str, role: Role, spec: GemmSpec, device: str) -> None:
    try:
        reason = choose(GemmRequest(kind, role, spec, device)).reason
    except NotSupported as error:
        reason = str(error)
    warnings.warn(
        f"{site} {role}: `{spec}` runs in the reference, rounding by rounding in torch "
        f"operations. Expected a kernel for more than {reference_gemm.MANY_PRODUCTS:.0e} products. Got none: {reason}. "
        "Try sums in fp32, installing g++ with OpenMP, or moving the model to the CPU.",
        SlowPathWarning,
        stacklevel=2,
    )
