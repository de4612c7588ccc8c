"""The ground floor: numbers, ops, kernels, collectives, optimizers. Knows no graph and no policy."""

from runtime.ops.matrix_product import gemm

__all__ = ["gemm"]
