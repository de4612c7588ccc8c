"""Kernels: one file a backend, and the dispatch that chooses among them."""
