"""Range formats: integers laid between the ends of what is cast, so that no value saturates, a format's own scales.

    ptqB   per tensor: one range, stretched so that 0 is one of its values
    psqB   per sample: a range for each sample, the first dim
    bhqB   block Householder: samples of large and small range are mixed by reflections, cast as by psqB, and unmixed

B is the number of bits, 2 to 8, so that a range has 2^B - 1 steps. Source: Chen et al., A Statistical Framework for
Low-bitwidth Training of Deep Neural Networks, NeurIPS 2020 (arXiv 2010.14298), and its authors' code (StatQuant).
range_casts.py has the arithmetic.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from runtime.errors import FormatError

RangeKind = Literal["ptq", "psq", "bhq"]
_KINDS: tuple[RangeKind, ...] = get_args(RangeKind)
_NAME = re.compile(rf"({'|'.join(_KINDS)})([0-9]+)")


@dataclass(frozen=True)
class RangeFormat:
    """One of the three, with its number of bits."""

    name: str
    kind: RangeKind
    bits: int

    @property
    def steps(self) -> int:
        """Between the ends of a range: 2^bits - 1."""
        return int(2**self.bits - 1)


def is_range_format(name: str) -> bool:
    """Whether `name` is written as a range format; its bits may still be wrong."""
    return _NAME.fullmatch(name) is not None


@lru_cache(maxsize=256)
def get_range_format(name: str) -> RangeFormat:
    """The range format called `name`. Raises FormatError for bits that none has."""
    matched = _NAME.fullmatch(name)
    kind, bits = (matched[1], matched[2]) if matched else ("", "")
    if len(bits) != 1 or not 2 <= int(bits) <= 8:
        expected = f"{' or '.join(f'{each}2 to {each}8' for each in _KINDS)}"
        raise FormatError(f'"{name}" is not a range format', expected=expected)
    return RangeFormat(name, kind, int(bits))  # type: ignore[arg-type]
