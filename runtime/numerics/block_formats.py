"""Block formats: `block` elements that lie together share one scale.

    value = element * scale / tensor_scale

    mx*     scale = 2^k, a code of e8m0; tensor_scale = 1                     OCP Microscaling Formats v1.0
    nvfp4   scale a code of e4m3; tensor_scale one fp32 number per tensor     NVIDIA Transformer Engine
    nvfp4-2d   the same, a tile of 16 x 16 of the last two dims a block: x and its transpose have the same values

A row says what the elements and the scale are and by which rule the scale is chosen; block_casts.py has the arithmetic.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from runtime.errors import FormatError, nearest_names
from runtime.numerics.format_kinds import DefaultRounding, FloatFormat, Format
from runtime.numerics.formats import get_format
from runtime.numerics.range_formats import is_range_format

BlockScaleRule = Literal["floor", "ceil", "rceil", "even", "two_level", "headroom", "four_six", "eden"]
BLOCK_RULES: tuple[BlockScaleRule, ...] = get_args(BlockScaleRule)
"""The last four have two levels: a scale a block under one of the tensor."""
EDEN_SPAN = 128
"""Elements that share a correction under `eden`: those that are rotated together."""


@dataclass(frozen=True)
class BlockFormat:
    """A block format: `block` codes of `element` and one of `scale`."""

    name: str
    """How it is written."""
    element: str
    """Format of the elements."""
    block: int
    """Elements that share a scale, along the last dim."""
    scale: str
    """Format of the scale."""
    rule: BlockScaleRule = "floor"
    """How the scale of a block is chosen; `NAME:scale=RULE` chooses another. two_level: nvfp4's."""
    height: int = 1
    """Rows that share a scale, along the last dim but one."""
    element_unit: float = 1.0
    """What an element of 1 stands for: mxint8 is int8 in units of 2^-6."""
    source: str = ""
    """Where the row comes from."""

    @property
    def bits_per_value(self) -> float:
        """Bits of an element and of its share of the scale."""
        return get_format(self.element).bits + get_format(self.scale).bits / (self.block * self.height)

    @property
    def element_max(self) -> float:
        """Largest value of an element, in the units of the scale."""
        return get_format(self.element).max * self.element_unit

    @property
    def block_max(self) -> float:
        """Largest value of an element under the largest scale of a block: 6 * 448 in nvfp4. Under four_six and eden,
        which may take a larger scale after all, 6 * 256.
        """
        largest = _ROOM if self.rule in ("four_six", "eden") else get_format(self.scale).max
        return self.target * largest

    @property
    def is_two_level(self) -> bool:
        """Whether there is a scale of the whole tensor too."""
        return self.rule in _TWO_LEVELS

    @property
    def is_square(self) -> bool:
        """Whether a block is a tile of two dims, the same for x and its transpose."""
        return self.height > 1

    @property
    def target(self) -> float:
        """Where the largest of a block goes, in units of its scale, before that is rounded. headroom leaves 1/17 for a
        scale that is rounded down, so that nothing is clipped.
        """
        return self.element_max * 16 / 17 if self.rule == "headroom" else self.element_max


def is_block_format(name: str) -> bool:
    """Whether `name` is written as a block format; its option may still be wrong."""
    return name.partition(":")[0] in BLOCK_FORMATS


@lru_cache(maxsize=256)
def get_block_format(name: str) -> BlockFormat:
    """The block format called `name`: a row of BLOCK_FORMATS, or one of MX with `:scale=floor|ceil|rceil|even`, or
    nvfp4 with `:scale=headroom|four-six|eden`.
    """
    base, colon, option = name.partition(":")
    if base not in BLOCK_FORMATS:
        raise FormatError(f'"{name}" is not a block format', hint=nearest_names(name, tuple(BLOCK_FORMATS)))
    row = BLOCK_FORMATS[base]
    if not colon:
        return row
    key, _, rule = option.partition("=")
    known = () if row.is_square else _NVFP4_RULES if row.is_two_level else _MX_RULES
    if key != "scale" or rule not in known:
        raise FormatError(
            f'"{name}": "{option}" is not an option of {base}',
            expected=f"scale={'|'.join(known)}" if known else "no option",
        )
    return replace(row, name=name, rule=rule.replace("-", "_"))  # type: ignore[arg-type]


def default_rounding(name: str) -> DefaultRounding:
    """The rounding a bare format name means; of a block format, that of its elements."""
    if is_range_format(name):
        return "nearest_even"
    return get_format(get_block_format(name).element if is_block_format(name) else name).rounding


@lru_cache(maxsize=4096)
def grid_format(name: str) -> Format:
    """The format that holds the grid values of a cast to `name`: its own row, or for a block format the smallest
    `1-E-M` that has every element * scale (nvfp4: tensor_scale left out).

    The values of a range format lie anywhere in fp32.

    Under `ceil`, `rceil` and `even` the top block of fp32's range can round to 2^128, Inf in fp32, which no row has.
    """
    if not is_block_format(name):
        return get_format("fp32" if is_range_format(name) else name)
    row = get_block_format(name)
    element, scale = get_format(row.element), get_format(row.scale)
    digits = element.mantissa if isinstance(element, FloatFormat) else int(element.max).bit_length() - 1
    if not isinstance(scale, FloatFormat):  # a power of two: all exponents of fp32
        return FloatFormat(name, 8, digits, 127)
    digits += scale.mantissa + 1
    quantum = getattr(element, "quantum", 1.0) * row.element_unit * scale.quantum
    return FloatFormat(name, 5, digits, 1 - digits - (math.frexp(quantum)[1] - 1), top="none")


_MX_RULES, _TWO_LEVELS = BLOCK_RULES[:4], BLOCK_RULES[4:]
_NVFP4_RULES = ("headroom", "four-six", "eden")
_ROOM = 256.0
_OCP = "OCP Microscaling Formats v1.0, section 5.2"

BLOCK_FORMATS: dict[str, BlockFormat] = {
    row.name: row
    for row in (
        BlockFormat("mxfp8", "e4m3", 32, "e8m0", source=_OCP),
        BlockFormat("mxfp8-e5m2", "e5m2", 32, "e8m0", source=_OCP),
        BlockFormat("mxfp6", "e2m3", 32, "e8m0", source=_OCP),
        BlockFormat("mxfp6-e3m2", "e3m2", 32, "e8m0", source=_OCP),
        BlockFormat("mxfp4", "e2m1", 32, "e8m0", source=_OCP),
        BlockFormat("mxint8", "int8", 32, "e8m0", element_unit=2.0**-6, source=f"{_OCP}; symmetric, without -2"),
        BlockFormat("nvfp4", "e2m1", 16, "e4m3", rule="two_level", source="NVIDIA Transformer Engine, NVFP4 recipe"),
        BlockFormat("nvfp4-2d", "e2m1", 16, "e4m3", rule="two_level", height=16, source="the same recipe, its weights"),
    )
}
