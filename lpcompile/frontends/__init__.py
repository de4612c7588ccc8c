"""Front ends: who reaches which GEMM."""
