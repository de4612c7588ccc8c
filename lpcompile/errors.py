"""Error kinds of the front door: those of the ground floor, and what a policy, its file or its lowering can add."""

from runtime.errors import (
    FormatError,
    LoweringError,
    LoweringWarning,
    LpError,
    LpWarning,
    NotSupported,
    ParseError,
    PassError,
    VerifyError,
    WireError,
    nearest_names,
)

__all__ = [
    "FormatError",
    "LoweringError",
    "LoweringWarning",
    "LpError",
    "LpWarning",
    "NotSupported",
    "ParseError",
    "PassError",
    "PolicyError",
    "VerifyError",
    "WireError",
    "did_you_mean",
    "nearest_names",
]


class PolicyError(LpError):
    """A policy says something that does not exist or contradicts itself."""


def did_you_mean(what: str, hint: str) -> str:
    """`what`, and a hint of `nearest_names` as its second sentence: `... Did you mean "e4m3"? Known: bf16, e4m3`."""
    return f"{what}. Did you mean {hint}" if hint.startswith('"') else f"{what}. {hint}"
