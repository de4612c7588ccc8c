"""Patterns: which module paths a rule means, by glob, by regular expression, by layer number; and bounds on sizes.

*.mlp.*  q_proj  [qk]_proj  layers.?.mlp      globs: `*` also crosses dots, a set holds single characters
re:.*\\.layers\\.(3|7)\\..*                      a regular expression, which matches the whole path
2-13, -2..                                    layers 2 to 13 and the last two, by the first number in the path
>=64,<=4096   %16   64                        sizes: both bounds, a multiple of 16, exactly 64
"""

import re
from collections.abc import Callable, Mapping
from fnmatch import translate
from functools import lru_cache
from typing import Any

from lpcompile.policy.fields import as_written, refusal

REGEX = "re:"
_LONGEST = 500


def check_pattern(text: str) -> str:
    """A glob, or `re:` and a regular expression. Refused with the key that says it where it means something else."""
    if len(text) > _LONGEST:
        raise refusal(f"a pattern of {len(text)} characters", expected=f"at most {_LONGEST}")
    if text.startswith(REGEX):
        return _check_regex(text)
    shown = f'"{text}"'
    for is_wrong, what, hint in _MISTAKES:
        if is_wrong(text):
            raise refusal(f"{shown}: {what}", hint=hint)
    for inside in re.findall(r"\[!?([^\]]*)\]", text):
        _check_set(text, inside)
    return text


def matches_any(patterns: tuple[str, ...], *paths: str) -> bool:
    """Whether one of these checked patterns is of one of the paths."""
    compiled = _compiled(patterns)
    return any(each.fullmatch(path) for path in paths for each in compiled)


@lru_cache(maxsize=4096)
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """All globs as one expression, and each that is written as one."""
    globs = [translate(text) for text in patterns if not text.startswith(REGEX)]
    others = [text.removeprefix(REGEX) for text in patterns if text.startswith(REGEX)]
    return tuple(map(re.compile, ["|".join(globs), *others] if globs else others))


def _check_regex(text: str) -> str:
    pattern = text.removeprefix(REGEX)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise refusal(f'"{text}" is not a regular expression', got=str(error)) from None
    if re.search(r"\([^()]*[+*}][^()]*\)[+*{]|\((?:[^()]|\([^()]*\))*[+*}](?:[^()]|\([^()]*\))*\)[+*{]", pattern):
        raise refusal(f'"{text}" repeats a repetition, which takes for ever on some names', hint="one repetition")
    if len(re.findall(r"[*+}]", pattern)) > 8:
        raise refusal(f'"{text}" has more than 8 repetitions', hint="a list of patterns")
    return text


def _check_set(text: str, inside: str) -> None:
    if inside.startswith("^"):
        what = f'"[{inside}]" holds the character ^'
        raise refusal(f'"{text}": {what}', hint=f"[!{inside[1:]}] for other characters, or the key not")
    if re.search(r"[0-9]{2}|[0-9]-[0-9]{2}", inside) and "-" in inside:
        hint = f'layers: "{inside}" for layers by number'
        raise refusal(
            f'"{text}": a set holds single characters, and "[{inside}]" is not the range it looks like', hint=hint
        )
    if any(low > high for low, high in re.findall(r"(.)-(.)", inside)):
        hint = "the smaller character first"
        raise refusal(f'"{text}": the range in "[{inside}]" is empty', hint=hint)


def _has(characters: str) -> Callable[[str], bool]:
    return lambda text: any(each in text for each in characters)


_AS_REGEX = "re: before it for a regular expression"
_MISTAKES: tuple[tuple[Callable[[str], bool], str, str], ...] = (
    (_has("\u201c\u201d\u2018\u2019\u00ab\u00bb"), "curly quotes are no quotes", 'straight ones: "'),
    (_has("\u00a0\u202f"), "a no-break space stands in it", "the name without it"),
    (str.isspace, "a name of spaces", "*"),
    (lambda text: text.startswith("!"), "a leading ! is a character of the name", "the key not"),
    (_has(",|"), "a name is one glob", "a list of names: [a, b]"),
    (_has("{}"), "braces are characters of the name", "a list of names: [a, b]"),
    (lambda text: text.startswith(("^", ".*")) or text.endswith("$"), "names are globs", _AS_REGEX),
    (_has("\\()+"), "names are globs", _AS_REGEX),
    (lambda text: re.sub(r"\[[^\]]+\]", "", text).count("[") > 0, "a set has no end", "a ] for the ["),
)


# Layers


def check_layers(value: Any) -> str:
    """`2-13, -2..`, or a number or a list of these, in one spelling. `first 2` and `last 2` are read too."""
    items = value if isinstance(value, list | tuple) else [value]
    parts = [part for item in items for part in str(item).split(",")]
    if not parts or any(isinstance(item, bool) or not isinstance(item, int | str) for item in items):
        raise refusal(f"{as_written(value)} says no layers", expected=_LAYERS)
    ranges = [_read_range(part.strip().lower(), value) for part in parts]
    return ", ".join(_print_range(low, high) for low, high in ranges)


def matches_layers(text: str, layer: int | None, count: int | None) -> bool:
    """Whether a layer of `count` is one of `text`, which `check_layers` gave; where the count is not known, none is
    counted from the end.
    """
    if layer is None:
        return False
    for part in text.split(", "):
        bounds = _read_range(part, text)
        if count is None and any(each is not None and each < 0 for each in bounds):
            continue
        low, high = (each + (count or 0) if each is not None and each < 0 else each for each in bounds)
        if (low is None or low <= layer) and (high is None or layer <= high):
            return True
    return False


def layer_of(path: str) -> tuple[str, int] | None:
    """The path before the first number in a path, and the number: `model.layers.12.mlp` is (model.layers, 12)."""
    parts = path.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))


def count_layers(paths: list[str]) -> Mapping[str, int]:
    """How many layers there are, by the path before their number."""
    counts: dict[str, int] = {}
    for found in map(layer_of, paths):
        if found is not None:
            counts[found[0]] = max(counts.get(found[0], 0), found[1] + 1)
    return counts


_LAYERS = 'numbers and ranges such as "2-13, -2..", where -1 is the last layer'
_Range = tuple[int | None, int | None]


def _read_range(part: str, value: Any) -> _Range:
    number = "(-?[0-9]{1,6})"
    if found := re.fullmatch(r"(first|last) ([1-9][0-9]{0,5})", part):
        return (0, int(found[2]) - 1) if found[1] == "first" else (-int(found[2]), None)
    if found := re.fullmatch(number, part):
        return int(part), int(part)
    for pattern in (rf"{number}? *\.\. *{number}?", r"([0-9]{1,6}) *- *([0-9]{1,6})"):
        if (found := re.fullmatch(pattern, part)) and any(found.groups()):
            low, high = (None if each is None else int(each) for each in found.groups())
            if low is not None and high is not None and (low < 0) == (high < 0) and low > high:
                raise refusal(f'"{part}" is no layer', expected="the smaller number first")
            return low, high
    raise refusal(f"{as_written(value)} says no layers", expected=_LAYERS)


def _print_range(low: int | None, high: int | None) -> str:
    if low == high:
        return str(low)
    if low is None or high is None or low < 0 or high < 0:
        return f"{'' if low is None else low}..{'' if high is None else high}"
    return f"{low}-{high}"


# Sizes


def check_bound(value: Any) -> str:
    """`>=64,<=4096`, `%16`, or a bare size for `==64`; a list of these holds together."""
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    return ",".join(_read_bound(part, value) for part in parts)


def _read_bound(part: Any, value: Any) -> str:
    text = f"=={part}" if isinstance(part, int) and not isinstance(part, bool) else str(part).replace(" ", "")
    text = f"=={text}" if re.fullmatch(r"[0-9]{1,12}", text) else text
    sign = next((sign for sign in _COMPARISONS if text.startswith(sign)), "")
    if not sign or not re.fullmatch(r"[0-9]{1,12}", text.removeprefix(sign)) or text == "%0":
        signs = " ".join(_COMPARISONS)
        expected = f"a size such as 64 or a comparison such as >=64 (one of {signs})"
        raise refusal(f'"{str(value)[:60]}" is not a bound', expected=expected)
    return text


def fulfils(size: int | None, bounds: str) -> bool:
    """Whether a size is within all of `bounds`, which `check_bound` gave; one that is not known is within none."""
    if size is None:
        return False
    for bound in bounds.split(","):
        sign = next(sign for sign in _COMPARISONS if bound.startswith(sign))
        if not _COMPARISONS[sign](size, int(bound.removeprefix(sign))):
            return False
    return True


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    ">=": lambda size, bound: size >= bound,
    "<=": lambda size, bound: size <= bound,
    "==": lambda size, bound: size == bound,
    "!=": lambda size, bound: size != bound,
    ">": lambda size, bound: size > bound,
    "<": lambda size, bound: size < bound,
    "!%": lambda size, bound: size % bound != 0,
    "%": lambda size, bound: size % bound == 0,
}
