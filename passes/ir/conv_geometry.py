"""Conv geometry: stride, padding, dilation and groups of a convolution as it is called, padding by name resolved."""

from collections.abc import Sequence
from typing import Any

from runtime.ops.contractions import ConvGeometry


def read_geometry(
    kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[list[int], ConvGeometry]:
    """What torch.nn.functional.convNd is given, `kernel` being the sizes of the window -> the padding that comes before
    it, as F.pad takes it, where one side of a dim gets more than the other, else []; and the geometry of what is left.
    """
    stride, dilation = (per_dim(value, len(kernel)) for value in (stride, dilation))
    before: list[int] = []
    if padding == "valid":
        padding = 0
    elif padding == "same":
        totals = [step * (taps - 1) for step, taps in zip(dilation, kernel)]
        padding = tuple(total // 2 for total in totals)
        if any(total % 2 for total in totals):  # torch pads the one more at the end, before it convolves
            before = [side for total in reversed(totals) for side in (0, total % 2)]
    return before, ConvGeometry(stride, per_dim(padding, len(kernel)), dilation, groups)


def per_dim(value: Any, num_dims: int) -> tuple[int, ...]:
    """One number for every spatial dim; torch takes one number or a sequence of one for all."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * num_dims if len(values) == 1 else values
