"""Findings: what a check of a policy against a model has to say, short of an error."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or a risk. The certificate lists it; what is wrong is refused under strict.

    `str(finding)` is one sentence or two: `where: what. Try ... [code]`.
    """

    code: str
    """Which check said it, for machines: rule-matches-nothing, tied-weights, ..."""
    where: str
    """The rule, or the sites."""
    what: str
    hint: str = ""
    """What to try."""
    is_wrong: bool = False
    """True where the policy cannot mean it; False where it may, knowing the risk."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f". Try {self.hint}" if self.hint else "") + f" [{self.code}]"


def names_of(sites: list[str]) -> str:
    """`a`, `a and b`, or `a and 11 more`."""
    return " and ".join(sites) if len(sites) < 3 else f"{sites[0]} and {len(sites) - 1} more"
