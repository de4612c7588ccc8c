"""Constants: numbers by which Python and C++ know one another's choices, written once; C++ gets them as -D flags."""

from runtime.numerics.block_formats import BLOCK_RULES

MAX_TABLE = 64
"""Values that the table of a lookup format may have, those past its ends counted."""
RULE_NUMBERS = {rule: number for number, rule in enumerate(BLOCK_RULES)}
"""BlockPlan.rule."""
ROUNDING_NUMBERS = {"nearest_even": 0, "nearest_away": 1, "toward_zero": 2, "stochastic": 3}
"""WidePlan.mode: the roundings that the loops know. Another is the oracle's, until they learn it."""
DEFINES = (f"-DLP_MAX_TABLE={MAX_TABLE}", *(f"-DLP_RULE_{rule.upper()}={n}" for rule, n in RULE_NUMBERS.items()))
