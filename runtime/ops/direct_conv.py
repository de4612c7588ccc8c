"""Direct convolutions: where in an image the products of each sum lie, for kernels that need no matrices. The sums are
those of runtime/ops/im2col.py, bit for bit.

Between the rows of dy that a stride sets apart, BWD has zeros. The output positions of one remainder modulo the stride
meet the same taps, so each of them is a convolution of dy as it is with fewer taps: adding a zero product changes no
sum but -0, which becomes 0. What is left of that is looked for, and such a result, like one of weights that are not
finite, is left to the matrices.
"""

from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from runtime.kernels.direct import AbstractDirect, Taps
from runtime.ops.contractions import ConvGeometry


def forward(direct: AbstractDirect, padded: Tensor, w: Tensor, size: torch.Size, g: ConvGeometry) -> Tensor:
    """y (B, O, *size) of the padded x."""
    x = padded.float().contiguous()
    y = torch.empty(x.shape[0], w.shape[0], *size, dtype=torch.float32, device="cpu")
    weights = w.float().reshape(g.groups, w.shape[0] // g.groups, w.shape[1], prod(w.shape[2:])).permute(0, 2, 3, 1)
    if y.numel():
        direct.convolve(x, weights, _taps(x.shape[2:], w.shape[2:], size, g), y)
    return y


def input_gradient(direct: AbstractDirect, dy: Tensor, w: Tensor, size: torch.Size, g: ConvGeometry) -> Tensor | None:
    """dx (B, C, *size); None where products with zeros cannot be left out."""
    is_apart = any(s > 1 for s in g.stride)
    if is_apart and not bool(w.isfinite().all()):
        return None
    padding, phases = _phases(dy.shape[2:], w.shape[2:], size, g)
    x = torch.nn.functional.pad(dy.float(), padding).contiguous()
    dx = torch.zeros(dy.shape[0], w.shape[1] * g.groups, *size, dtype=torch.float32, device="cpu")
    if not direct.fits(x, dx.numel()):
        return None
    flipped = w.float().flip(tuple(range(2, w.dim())))
    weights = flipped.reshape(g.groups, w.shape[0] // g.groups, w.shape[1], prod(w.shape[2:])).transpose(2, 3)
    for taps in phases if dx.numel() else ():
        direct.convolve(x, weights, taps, dx)
    if is_apart and bool(((dx == 0) & dx.signbit()).any()):
        return None
    return dx


def weight_gradient(direct: AbstractDirect, dy: Tensor, padded: Tensor, w_shape: torch.Size, g: ConvGeometry) -> Tensor:
    """dw (O, C / groups, ...) of the padded x."""
    x, size = padded.float().contiguous(), dy.shape[2:]
    if not prod(w_shape):
        return torch.empty(w_shape, dtype=torch.float32, device="cpu")
    taps = _taps(x.shape[2:], w_shape[2:], size, g)
    return direct.correlate(dy.float().flatten(2).contiguous(), x, taps, g.groups).reshape(w_shape)


@lru_cache(maxsize=1024)
def _taps(padded: torch.Size, kernel: torch.Size, size: torch.Size, g: ConvGeometry) -> Taps:
    """Of a convolution of a padded image."""
    steps = _steps(padded)
    lane = _places([[i * s for i in range(n)] for n, s in zip(size, g.stride)], steps)
    tap = _places([[t * d for t in range(k)] for k, d in zip(kernel, g.dilation)], steps)
    return Taps(lane, tap, _numbers(range(len(tap))), _numbers(range(len(lane))), len(tap))


@lru_cache(maxsize=1024)
def _phases(
    of_dy: torch.Size, kernel: torch.Size, size: torch.Size, g: ConvGeometry
) -> tuple[tuple[int, ...], tuple[Taps, ...]]:
    """How to pad dy, last dim first, and the convolutions that make dx: one for each remainder of its positions."""
    dims = []
    for n, k, s, p, d in zip(size, kernel, g.stride, g.padding, g.dilation):
        first = p - d * (k - 1)
        phases = []
        for phase in range(min(s, n)):
            at = [(t, (phase + t * d + first) // s) for t in range(k) if (phase + t * d + first) % s == 0]
            phases.append((phase, (n - phase + s - 1) // s, at))
        dims.append(phases)
    padding, starts, padded = [], [], []
    for m, phases in zip(of_dy, dims):
        ends = [(e, e + count - 1) for _, count, at in phases for _, e in at]
        before = max([0, *(-e for e, _ in ends)])
        after = max([0, *(e - (m - 1) for _, e in ends)])
        padding.append((before, after))
        starts.append(before)
        padded.append(before + m + after)
    steps, out_steps, found = _steps(padded), _steps(size), []
    for chosen in product(*dims):
        taps = list(product(*(at for _, _, at in chosen)))
        lane = _places([range(count) for _, count, _ in chosen], steps)
        tap = [sum((e + b) * step for (_, e), b, step in zip(each, starts, steps)) for each in taps]
        number = [sum(t * step for (t, _), step in zip(each, _steps(kernel))) for each in taps]
        places = [range(phase, n, s) for (phase, _, _), n, s in zip(chosen, size, g.stride)]
        found.append(Taps(lane, _numbers(tap), _numbers(number), _places(places, out_steps), prod(kernel)))
    return tuple(n for pair in reversed(padding) for n in pair), tuple(found)


def _steps(size: torch.Size | list[int]) -> list[int]:
    """By how many elements neighbours along each dim are apart."""
    return [prod(size[dim + 1 :]) for dim in range(len(size))]


def _places(along: "list[range] | list[list[int]]", steps: list[int]) -> Tensor:
    """The places of all combinations, last dim fastest."""
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for each, step in zip(along, steps):
        places = (places[:, None] + torch.tensor(list(each), dtype=torch.int64, device="cpu") * step).flatten()
    return places.int()


def _numbers(values: "range | list[int]") -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device="cpu")
