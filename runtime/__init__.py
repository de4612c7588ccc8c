"""The ground floor: numbers, ops, kernels, collectives, optimizers. Knows no graph and no policy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.ops.matrix_product import gemm

__all__ = ["gemm"]


def __getattr__(name: str) -> Any:
    """Looked up when it is first asked for: formats and policies are read without torch."""
    if name != "gemm":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from runtime.ops.matrix_product import gemm

    globals()[name] = gemm
    return gemm
