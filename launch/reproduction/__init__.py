"""Reproduction: published claims about low-precision training, run again."""
