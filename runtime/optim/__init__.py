"""Optimizer-side numerics."""
