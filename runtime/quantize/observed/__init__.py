"""Quantizers whose scale follows from what was cast in the steps before: modules with buffers, under `_lp.SITE.`."""
