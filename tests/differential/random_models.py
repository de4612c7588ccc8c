"""Random small models: linear layers, convolutions of every geometry, einsum, attention, recurrence; modules shared,
tied and nested. `random_model(seed)` gives the same model and input for the same seed.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model with its input. `is_bilinear`: every product of it is a function that the reference knows."""

    model: nn.Module
    x: Tensor
    kind: str
    is_bilinear: bool = True


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(nn.Module):
    """One module that one forward runs twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Tied(nn.Module):
    """Two layers with one weight, and a product with that weight written as an operation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + F.linear(x, self.a.weight)


class Einsum(nn.Module):
    """An einsum of two activations whose labels are drawn: batch, sum, left and right, in any order on each side."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        left, right, out = list("bik"), list("bjk"), list("bij")
        for labels in (left, right, out):
            draw.shuffle(labels)
        self.left, self.right, self.equation = left, right, f"{''.join(left)},{''.join(right)}->{''.join(out)}"

    def forward(self, x: Tensor) -> Tensor:
        a = torch.einsum(f"bik->{''.join(self.left)}", self.a(x))
        b = torch.einsum(f"bjk->{''.join(self.right)}", self.b(x))
        return torch.einsum(self.equation, a, b)


class Attention(nn.Module):
    def __init__(self, draw: random.Random, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=draw.random() < 0.5) for _ in range(4))
        self.heads, self.fused, self.causal = heads, draw.random() < 0.5, draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            y = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class First(nn.Module):
    """The first result of a module that gives several."""

    def __init__(self, inner: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(*(x,) * self.times)[0]
        return y


def random_model(seed: int) -> Case:
    """The case of this seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kind = draw.choice(list(_FAMILIES))
    model, x, is_bilinear = _FAMILIES[kind](draw)
    return Case(model, x, kind, is_bilinear)


def _linear(draw: random.Random) -> tuple[nn.Module, Tensor, bool]:
    widths = [draw.choice([1, 3, 8, 16, 24]) for _ in range(draw.randint(2, 4))]
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layer: nn.Module = nn.Linear(n_in, n_out, bias=draw.random() < 0.7)
        if n_in == n_out:
            layer = draw.choice([Residual, Twice, lambda inner: nn.Sequential(inner)])(layer)
        layers += [layer, draw.choice([nn.ReLU, nn.GELU, nn.Tanh, nn.Identity])()]
    lead = draw.choice([(2,), (3, 2), (), (2, 1, 2), (5,)])
    return nn.Sequential(*layers), torch.randn(*lead, widths[0]), True


def _tied(draw: random.Random) -> tuple[nn.Module, Tensor, bool]:
    return nn.Sequential(Tied(8), nn.Linear(8, 5)), torch.randn(draw.randint(1, 4), 8), True


def _conv(draw: random.Random) -> tuple[nn.Module, Tensor, bool]:
    dims, groups = draw.choice([1, 1, 2, 2, 3]), draw.choice([1, 1, 2, 4])
    channels = 4 * draw.randint(1, 2)

    def per_dim(low: int, high: int) -> Any:
        drawn = tuple(draw.randint(low, high) for _ in range(dims))
        return draw.choice([drawn, drawn[0]])

    options: dict[str, Any] = {"groups": groups, "bias": draw.random() < 0.5, "dilation": per_dim(1, 2)}
    options["stride"] = per_dim(1, 3)
    options["padding"] = per_dim(0, 2)
    if draw.random() < 0.2:
        options |= {"padding": draw.choice(["same", "valid"]), "stride": 1}
    if draw.random() < 0.3 and options["padding"] != "valid":
        options["padding_mode"] = draw.choice(["reflect", "replicate", "circular"])
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](channels, channels, per_dim(1, 3), **options)
    x = torch.randn(draw.randint(1, 3), channels, *(draw.randint(6, 8) for _ in range(dims)))
    if dims == 2 and draw.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(1)), x, True


def _transposed(draw: random.Random) -> tuple[nn.Module, Tensor, bool]:
    dims, groups = draw.choice([1, 2]), draw.choice([1, 2])
    stride, dilation = draw.randint(1, 3), draw.randint(1, 3)
    more = draw.randint(0, max(stride, dilation) - 1)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
    conv = kind(4, 6, draw.randint(1, 3), stride, draw.randint(0, 1), more, groups, draw.random() < 0.5, dilation)
    return nn.Sequential(conv, nn.GELU()), torch.randn(draw.randint(1, 3), 4, *(5,) * dims), True


def _einsum(draw: random.Random) -> tuple[nn.Module, Tensor, bool]:
    return Einsum(draw, 6), torch.randn(draw.randint(1, 3), draw.randint(1, 5), 6), True


def _attention(draw: random.Random) -> tuple[nn.Module, Tensor, bool]:
    return nn.Sequential(nn.LayerNorm(8), Attention(draw, 8, 2), nn.Linear(8, 3)), torch.randn(2, 5, 8), True


def _multihead(draw: random.Random) -> tuple[nn.Module, Tensor, bool]:
    return First(nn.MultiheadAttention(8, 2, batch_first=draw.random() < 0.5), 3), torch.randn(3, 4, 8), False


def _recurrent(draw: random.Random) -> tuple[nn.Module, Tensor, bool]:
    kind = draw.choice([nn.RNN, nn.LSTM, nn.GRU])
    return First(kind(6, 5, draw.randint(1, 2), bidirectional=draw.random() < 0.5)), torch.randn(4, 2, 6), False


_FAMILIES: dict[str, Callable[[random.Random], tuple[nn.Module, Tensor, bool]]] = {
    "linear": _linear,
    "tied": _tied,
    "conv": _conv,
    "transposed": _transposed,
    "einsum": _einsum,
    "attention": _attention,
    "multihead": _multihead,
    "recurrent": _recurrent,
}
