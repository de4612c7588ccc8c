"""Numbers: formats, rounding, scales, casts, counter-based random bits."""
