"""Kernels: GEMMs and casts at the speed of the machine, and the registry that chooses among them."""
