"""Rows: one GEMM of one site as the certificate tells of it."""

from dataclasses import dataclass

from runtime.numerics.specs import Role

REFUSED = "refused"
UNCALLED = "not-called"
FIDELITIES = ("bitwise", "format-exact", "bounded", "emulated", UNCALLED, REFUSED)
"""Best first. What each means stands in docs/architecture.md."""


@dataclass(frozen=True)
class GemmRow:
    """One GEMM of one site. lhs and rhs print as casts, `FORMAT ROUNDING [GRANULARITY/RULE]`."""

    name: str
    op: str
    role: Role
    lhs: str
    rhs: str
    accumulate: str
    out: str
    backend: str
    fidelity: str
    reason: str
    rule: str
    """The policy's rule that decided it, and what a pass chose where the rule leaves it open."""
    flops: int = 0
    """Of one row of input, in a layer with a weight; 0 where the sizes are not known before it runs."""

    calls: int = 0
    """Calls seen since compiling, in eager code: compiled code counts none."""
    calls_as_said: int = 0
    """Of those, how many ran as the policy says."""
    new_calls: int = 0
    """Calls seen since the last report."""
    new_calls_as_said: int = 0
    kept_per_row: float = 0.0
    """Bytes that forward keeps for this GEMM by a row of input, its share of scales included (of 4096 rows); 0 for FWD,
    for what reads the weight again, and where the sizes are not known before it runs. Layers that read one tensor alike
    keep it once.
    """
    kept: int | None = None
    """Bytes that the last call in eager code kept for this GEMM; None before one. What another kept already counts
    there.
    """

    @property
    def runs_as_policy_says(self) -> bool:
        """False if it, or a call of it, runs otherwise. What the example forward never called runs in no way, and is
        counted apart.
        """
        return self.fidelity != REFUSED and self.calls_as_said == self.calls

    @property
    def counts(self) -> str:
        """`3 of 5 calls`, or "" before there was one."""
        return f"{self.calls_as_said} of {self.calls} calls" if self.calls else ""

    @property
    def formula(self) -> str:
        """`e4m3 row/amax * e4m3 row/amax -> fp32 -> bf16`, what is the format's own rounding left out."""
        return f"{_short(self.lhs)} * {_short(self.rhs)} -> {self.accumulate} -> {self.out}"


def _short(cast: str) -> str:
    return cast.replace(" nearest_even", "")
