"""Casts by the fastest path there is: which kernel serves, or the oracle of runtime/numerics."""
