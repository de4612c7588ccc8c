"""A convolution's geometry is read as it runs: what is set after compiling holds, in eager code and over a graph."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lpcompile import lpcompile


def _set(**attributes: Any) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        for name, value in attributes.items():
            setattr(layer, name, value)

    return change


def _tile(layer: nn.Conv2d) -> None:
    """As who makes seamless textures does it."""
    layer.padding_mode, layer.padding, layer._reversed_padding_repeated_twice = "circular", (1, 1), [1, 1, 1, 1]


def _group(layer: Any) -> None:
    sizes = (4, 1, 3, 3) if isinstance(layer, nn.Conv2d) else (2, 2, 3, 3)
    layer.groups, layer.weight = 2, nn.Parameter(torch.ones(sizes))


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(
            (kind, _set(**{name: (2, 2)}))
            for kind in (nn.Conv2d, nn.ConvTranspose2d)
            for name in ("stride", "dilation")
        ),
        *((kind, _set(padding=(1, 1))) for kind in (nn.Conv2d, nn.ConvTranspose2d)),
        *((kind, _group) for kind in (nn.Conv2d, nn.ConvTranspose2d)),
        (nn.ConvTranspose2d, _set(stride=(2, 2), output_padding=(1, 1))),
        (nn.Conv2d, _tile),
    ],
)
def test_what_is_set_after_compiling_holds(kind: Any, change: Callable[[Any], None], mode: Any) -> None:
    x = torch.randn(2, 2, 9, 9)
    original = nn.Sequential(kind(2, 4, 3)).eval()
    model = lpcompile(copy.deepcopy(original), "fp32-emulated", (x,), mode=mode)
    change(original[0])
    change(model[0])
    with torch.no_grad():
        assert torch.equal(model(x), original(x))
