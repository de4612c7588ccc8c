"""Names of moments that are kept in blocks (runtime/optim/block_states.py). No torch: reading a policy needs none."""

from dataclasses import dataclass
from functools import lru_cache

from runtime.errors import NotSupported
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format

TABLES = {"dynamic8": 8, "dynamic4": 4}
"""Name -> bits of a code."""


@dataclass(frozen=True)
class BlockState:
    """What a name like `e4m3/128` stands for."""

    element: str
    block: int
    is_expanded: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return TABLES.get(self.element) or get_format(self.element).bits


@lru_cache(maxsize=256)
def block_state_of(name: str) -> BlockState | None:
    """None for a name without a block. NotSupported for one that means nothing."""
    element, slash, rest = name.partition("/")
    if not slash:
        return None
    block, _, expand = rest.partition("/")
    row = None if element in TABLES else get_format(element)
    is_float = isinstance(row, FloatFormat) and row.bits == 8 and row.has_nan and row.subnormals
    is_known = is_float if expand else is_float or element in TABLES
    if not (is_known and expand in ("", "expand") and block.isdecimal() and int(block) >= 2 and int(block) % 2 == 0):
        raise NotSupported(
            f"{name} is no state with blocks",
            expected="FORMAT/BLOCK or FORMAT/BLOCK/expand: a float of 8 bits with NaN and subnormals (without expand "
            "also dynamic8, dynamic4), and an even block",
            got=name, hint="e4m3/128, e4m3/128/expand, dynamic8/256, dynamic4/128",
        )  # fmt: skip
    return BlockState(element, int(block), bool(expand))
