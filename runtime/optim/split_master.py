"""A master weight in two parts, by the name that policies have for it. No torch: reading a policy needs none."""

SPLIT = "bf16+16"
"""A bf16, nearest to the fp32 master with ties away, and a signed remainder in 16 bits (runtime/optim/formats.py)."""
