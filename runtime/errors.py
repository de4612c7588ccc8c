"""Errors: each says where, what was expected, what was got, and what to try."""


class LpError(Exception):
    """Base of every error meant for a user; the command line prints it as one sentence and exits with 2.

    `str(error)` joins the parts: `where: what. Expected ... Got ... Try ...`.
    """

    is_of_all_ranks: bool = False
    """Every rank raises it: one of them is to speak."""

    def __init__(self, what: str, *, where: str = "", expected: str = "", got: str = "", hint: str = "") -> None:
        self.what, self.where, self.expected, self.got, self.hint = what, where, expected, got, hint
        parts = [f"{where}: {what}" if where else what]
        if expected:
            parts.append(f"Expected {expected}")
        if got:
            parts.append(f"Got {got}")
        if hint:
            parts.append(f"Try {hint}")
        sentences = (part.rstrip(".") for part in parts)
        super().__init__(" ".join(each if each.endswith("?") else f"{each}." for each in sentences))


class LpWarning(UserWarning):
    """Base of every warning meant for a user: something runs otherwise than was said, or costs more than it seems."""


class LoweringWarning(LpWarning):
    """A GEMM that a rule matches does not run as its policy says, or a check of the policy found something wrong."""


class LossScaleWarning(LpWarning):
    """A policy asks for a loss scale, and nothing applies it."""


class ScaleWarning(LpWarning):
    """A scale that follows from what is cast has reached the end of its range."""


class ScaleError(LpError):
    """The same, where strict was asked for."""


class FormatError(LpError, ValueError):
    """A number format, rounding or scale that does not exist or does not fit."""


class LoweringError(LpError):
    """A GEMM that a rule matches does not run as its policy says, and strict was asked for."""


class NotSupported(LpError):
    """Something the policy language can say and this version does not do yet. Never ignored silently."""


class ParseError(LpError):
    """A file is not the text it should be (YAML, IR); says the line."""


class VerifyError(LpError):
    """A graph breaks a rule of the IR."""


class PassError(LpError):
    """A pass cannot do its work on this graph."""


class WireError(LpError):
    """A collective cannot run as the policy says, or did not."""


class SlowPathWarning(UserWarning):
    """Work that is right and takes far longer than it could, said once; the text says why and what to do."""


def nearest_names(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """A hint naming the closest known spellings: `"e4m3"? Known: bf16, e4m3, ...`."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f'"{close[0]}"? ' if close else ""
    return f"{guess}Known: {', '.join(known)}"
