"""Convolutions as matrix products (im2col), for a `multiply` that rounds as it adds. The order of each sum, k:

    FWD   y    (c, r)     input channel of the group, then kernel position, last spatial dim fastest
    BWD   dx   (o, r)     output channel of the group, then position of the flipped kernel, over dy with the zeros that
                          stride and padding put between and around it, which are products too and count in chunks
    GRAD  dw   (b, p)     sample, then output position

Padding adds zero products as well. Of a transposed convolution FWD and BWD change places, and so do x and dy in GRAD.
Its output padding may reach a stride where the dilation is larger, so that dy has room for positions that x does not
have: the sums are over those of x. The output element that keys stochastic bits is (group, row, column) of the
product: (g, b p, o), (g, b p, c) and (g, o, c r).
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from runtime.kernels.direct import AbstractDirect
from runtime.ops import direct_conv
from runtime.ops.contractions import AbstractContraction, Conv, ConvGeometry, Multiply


def as_matrices(geometry: ConvGeometry, direct: AbstractDirect | None = None) -> AbstractContraction:
    """The convolution of this geometry as matrix products, or by `direct`, which has their bits."""
    return (UnfoldedConvTranspose if geometry.is_transposed else UnfoldedConv)(geometry, direct)


@dataclass(frozen=True)
class UnfoldedConv(Conv):
    """y = x * w by im2col; x (B, C, ...), w (O, C / groups, ...)."""

    direct: AbstractDirect | None = None

    def _fwd(self, lhs: Tensor, rhs: Tensor, multiply: Multiply) -> Tensor:
        g, kernel = self.geometry, rhs.shape[2:]
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, s, p, d, k in zip(lhs.shape[2:], g.stride, g.padding, g.dilation, kernel)
        ]
        return _forward(lhs, rhs, torch.Size(size), g, multiply, self.direct)

    def _bwd(self, dy: Tensor, rhs: Tensor, lhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        return _input_gradient(dy, rhs, lhs_shape[2:], self.geometry, multiply, self.direct)

    def _grad(self, dy: Tensor, lhs: Tensor, rhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        return _weight_gradient(dy, lhs, rhs_shape, self.geometry, multiply, self.direct)


@dataclass(frozen=True)
class UnfoldedConvTranspose(Conv):
    """The transpose of UnfoldedConv; x (B, O, ...), w (O, C / groups, ...) in the names of that convolution."""

    direct: AbstractDirect | None = None

    def _fwd(self, lhs: Tensor, rhs: Tensor, multiply: Multiply) -> Tensor:
        g = self.geometry
        size = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1 + more
            for n, s, p, d, k, more in zip(
                lhs.shape[2:], g.stride, g.padding, g.dilation, rhs.shape[2:], g.output_padding
            )
        ]
        return _input_gradient(lhs, rhs, torch.Size(size), g, multiply, self.direct)

    def _bwd(self, dy: Tensor, rhs: Tensor, lhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        return _forward(dy, rhs, lhs_shape[2:], self.geometry, multiply, self.direct)

    def _grad(self, dy: Tensor, lhs: Tensor, rhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        return _weight_gradient(lhs, dy, rhs_shape, self.geometry, multiply, self.direct)


def _check_channels(x: Tensor, wanted: int, w: Tensor) -> None:
    if x.shape[1] != wanted:
        raise RuntimeError(f"{x.shape[1]} channels do not fit a weight of size {tuple(w.shape)}: expected {wanted}")


def _forward(
    x: Tensor, w: Tensor, size: torch.Size, g: ConvGeometry, multiply: Multiply, direct: AbstractDirect | None
) -> Tensor:
    _check_channels(x, w.shape[1] * g.groups, w)
    padded = _padded(x, [(p, p) for p in g.padding])
    if direct is not None and direct.fits(padded, x.shape[0] * w.shape[0] * prod(size)):
        return direct_conv.forward(direct, padded, w, size, g)
    columns = _columns(padded, w.shape[2:], size, g.stride, g.dilation, g.groups)
    weights = w.reshape(g.groups, w.shape[0] // g.groups, prod(w.shape[1:])).transpose(-1, -2)
    return _image(multiply(columns, weights), x.shape[0], size)


def _input_gradient(
    dy: Tensor, w: Tensor, size: torch.Size, g: ConvGeometry, multiply: Multiply, direct: AbstractDirect | None
) -> Tensor:
    _check_channels(dy, w.shape[0], w)
    if direct is not None and direct.fits(dy, dy.shape[0] * w.shape[1] * g.groups * prod(size)):
        dx = direct_conv.input_gradient(direct, dy, w, size, g)
        if dx is not None:
            return dx
    kernel = w.shape[2:]
    spread = [(n - 1) * s + 1 for n, s in zip(dy.shape[2:], g.stride)]
    apart = dy.new_zeros((*dy.shape[:2], *spread))
    every = (slice(None), slice(None), *(slice(None, None, s) for s in g.stride))
    apart[every] = dy
    reach = [d * (k - 1) for d, k in zip(g.dilation, kernel)]
    padding = [(r - p, n + p - m) for r, p, n, m in zip(reach, g.padding, size, spread)]
    columns = _columns(_padded(apart, padding), kernel, size, (1,) * len(kernel), g.dilation, g.groups)
    flipped = w.flip(tuple(range(2, w.dim()))).reshape(g.groups, w.shape[0] // g.groups, w.shape[1], prod(kernel))
    return _image(multiply(columns, flipped.transpose(2, 3).flatten(1, 2)), dy.shape[0], size)


def _weight_gradient(
    dy: Tensor, x: Tensor, w_shape: torch.Size, g: ConvGeometry, multiply: Multiply, direct: AbstractDirect | None
) -> Tensor:
    """dw (O, C / groups, ...)."""
    padded = _padded(x, [(p, p) for p in g.padding])
    if direct is not None and direct.fits(padded, dy.numel()):
        return direct_conv.weight_gradient(direct, dy, padded, w_shape, g)
    columns = _columns(padded, w_shape[2:], dy.shape[2:], g.stride, g.dilation, g.groups)
    rows = dy.reshape(dy.shape[0], g.groups, dy.shape[1] // g.groups, prod(dy.shape[2:])).permute(1, 2, 0, 3).flatten(2)
    return multiply(rows, columns).reshape(w_shape)


def _padded(x: Tensor, padding: list[tuple[int, int]]) -> Tensor:
    """Zeros around the spatial dims; a negative number takes away, of zeros too that the other side gave."""
    x = torch.nn.functional.pad(x, [max(n, 0) for pair in reversed(padding) for n in pair])
    return torch.nn.functional.pad(x, [min(n, 0) for pair in reversed(padding) for n in pair])


def _columns(
    x: Tensor, kernel: torch.Size, size: torch.Size, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Tensor:
    """(groups, B positions, C / groups * kernel positions) of the first `size` positions of a padded x."""
    for dim, (k, n, s, d) in enumerate(zip(kernel, size, stride, dilation), start=2):
        x = x.unfold(dim, d * (k - 1) + 1, s).narrow(dim, 0, n)[..., ::d]
    ndim = len(kernel)
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    order = (1, 0, *range(3, 3 + ndim), 2, *range(3 + ndim, 3 + 2 * ndim))
    return x.permute(order).reshape(groups, x.shape[0] * prod(size), x.shape[2] * prod(kernel))


def _image(rows: Tensor, batch: int, spatial: torch.Size) -> Tensor:
    """(groups, B positions, channels of a group) -> (B, channels, ...)."""
    groups, _, channels = rows.shape
    image = rows.view(groups, batch, prod(spatial), channels).permute(1, 0, 3, 2)
    return image.reshape(batch, groups * channels, *spatial)
