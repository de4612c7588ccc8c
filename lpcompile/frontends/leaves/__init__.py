"""Leaves: modules that hold a GEMM, replaced in class and not in identity."""
