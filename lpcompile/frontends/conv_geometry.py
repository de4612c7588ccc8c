"""Conv geometry: stride, padding, dilation and groups of a convolution as it is called, padding by name resolved."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from runtime.ops.contractions import ConvGeometry


def read_geometry(
    x: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Tensor, ConvGeometry]:
    """What torch.nn.functional.convNd is given -> the input, padded where one side of a dim gets more than the other,
    and the geometry of what is left to do. `kernel`: the sizes of the window.
    """
    num_dims = len(kernel)
    stride, dilation = per_dim(stride, num_dims), per_dim(dilation, num_dims)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        totals = [step * (taps - 1) for step, taps in zip(dilation, kernel)]
        padding = tuple(total // 2 for total in totals)
        if any(total % 2 for total in totals):  # torch pads the one more at the end, before it convolves
            x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
    return x, ConvGeometry(stride, per_dim(padding, num_dims), dilation, groups)


def per_dim(value: Any, num_dims: int) -> tuple[int, ...]:
    """One number for every spatial dim; torch takes one number or a sequence of one for all."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * num_dims if len(values) == 1 else values
