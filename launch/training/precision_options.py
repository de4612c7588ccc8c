"""What `--telemetry` says: `every=50`, `50`, or `every=50,sample=4096,counterfactuals=mxfp8+e4m3 tensor`."""

from dataclasses import dataclass

from lpcompile.errors import LpError, did_you_mean, nearest_names
from lpcompile.watching.candidates import COUNTERFACTUALS, parse_candidate

_KEYS = ("every", "sample", "counterfactuals")


@dataclass(frozen=True)
class PrecisionOptions:
    """The arguments of lpcompile.telemetry."""

    every: int = 50
    """Steps from one that is looked at to the next."""
    sample: int = 8192
    """Elements of each tensor, about."""
    counterfactuals: tuple[str, ...] = COUNTERFACTUALS
    """Formats that do not run and are measured."""


def parse_precision_options(text: str) -> PrecisionOptions:
    """Raises LpError with what is wrong."""
    where, values = "--telemetry", dict[str, int | tuple[str, ...]]()
    for part in filter(None, (each.strip() for each in text.split(","))):
        key, equals, value = (each.strip() for each in part.partition("="))
        key, value = (key, value) if equals else ("every", key)
        if key not in _KEYS:
            raise LpError(did_you_mean(f'"{key}" is not an option', nearest_names(key, _KEYS)), where=where)
        if key in values:
            raise LpError(f"{key} is said twice", where=where, got=text)
        if key == "counterfactuals":
            values[key] = tuple(parse_candidate(each).name for each in value.split("+"))
            continue
        if not value.isdecimal() or int(value) < 1:
            raise LpError(f"not a number for {key}", where=where, expected="1 or more", got=value or text)
        values[key] = int(value)
    return PrecisionOptions(**values)  # type: ignore[arg-type]


def checked_precision(text: str | None) -> str | None:
    """A field's text, once it was read."""
    if text is not None:
        parse_precision_options(text)
    return text
