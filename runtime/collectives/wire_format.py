"""Wire format: which number formats gradients may travel in. Asked by policies, which are read without torch, too."""

from runtime.errors import WireError
from runtime.numerics.formats import get_format


def check_wire_format(format: str, block: int) -> None:
    """Raise WireError for a format whose codes are no signed bytes, or a block without elements."""
    if (bits := get_format(format).bits) != 8:
        raise WireError(
            f'wire format "{format}" does not fit the buffer',
            expected="a format of 8 bits, such as e4m3 or e5m2",
            got=f"{bits} bits",
        )
    if not get_format(format).signed:
        raise WireError(f'wire format "{format}" has no negative values', expected="a signed format, as e4m3")
    if block < 1:
        raise WireError("a block has no elements", where="WireSpec.block", expected=">= 1", got=str(block))
