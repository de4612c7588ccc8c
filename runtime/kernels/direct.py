"""Direct convolutions: what a kernel may have in the place of products of matrices. Bit for bit the sums over the
matrices of runtime/ops/im2col.py, which lays out the images and says the order of each sum.

    y[b, g N + n, out]  = sum over k = (c, t) of x[b, g C + c, lane + tap] w[g, c, number, n]
    dw[g N + n, c, t]   = sum over k = (b, p) of dy[b, g N + n, p] x[b, g C + c, lane + tap]

`lane`, `tap` and `out` are places of one padded channel of x or of y. A tap that is left out is a product with zeros.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Taps:
    """Where products lie. lane (P,): the first place of each position in a channel of x; tap (T,): the place of each
    tap beside it; number (T,): which of the kernel's `all_taps` positions it is; out (P,): the place in y. All int32.
    """

    lane: Tensor
    tap: Tensor
    number: Tensor
    out: Tensor
    all_taps: int


class AbstractDirect(ABC):
    """Sums of one GemmSpec over images in fp32."""

    @abstractmethod
    def fits(self, x: Tensor, y_numel: int) -> bool:
        """Whether places of these tensors are within what it can address."""

    @abstractmethod
    def convolve(self, x: Tensor, w_GCTN: Tensor, taps: Taps, y: Tensor) -> None:
        """Write y (B, G N, ...), contiguous, at the places of `taps`; x (B, G C, ...) is contiguous."""

    @abstractmethod
    def correlate(self, dy: Tensor, x: Tensor, taps: Taps, groups: int) -> Tensor:
        """dw (G N, C, T) of contiguous dy (B, G N, P) and x (B, G C, ...)."""
