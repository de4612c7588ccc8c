"""Quantizers that learn their scale: modules with state, in the model under `_lp.SITE.`."""
