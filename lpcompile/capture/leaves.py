"""Leaves: the modules that hold a GEMM's weight. Each gets a graph of its own, with no recording: the floor under every
capture.

    torch.nn.Linear            linear(input, weight, bias)
    torch.nn.Conv1d/2d/3d      convNd(input, weight, bias, stride, padding, dilation, groups)
    transformers' Conv1D       linear_kn(x, weight, bias)        weight is stored as (in, out)

A subclass counts only if it did not write a forward of its own. What holds GEMMs and is not here is listed as
unreached, by name.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from runtime.contractions import linear_kn


@dataclass(frozen=True)
class Leaf:
    """One GEMM-bearing leaf of a model. `index` is its place in registration order; n and k are the sizes of its
    weight's matrix.
    """

    path: str
    op: str
    index: int
    n: int
    k: int


@dataclass(frozen=True)
class Unreached:
    """A module that multiplies matrices where no graph of ours sees it, and why."""

    path: str
    reason: str


def find_leaves(model: nn.Module) -> tuple[list[Leaf], list[Unreached]]:
    """Every leaf, in registration order, and every module known to hold GEMMs that are not reached."""
    leaves: list[Leaf] = []
    unreached: list[Unreached] = []
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside) and inside:
            continue
        if isinstance(module, _UNREACHED):
            reason = f"{type(module).__name__} is one fused op; its products are not reached yet"
            unreached.append(Unreached(path, reason))
            inside += (f"{path}.",)
        elif isinstance(module, _CONVS) and module.padding_mode != "zeros":
            unreached.append(Unreached(path, f'padding_mode="{module.padding_mode}" pads before the convolution'))
        elif is_leaf(module):
            leaves.append(Leaf(path, _op(module), len(leaves), *_sizes(module)))
    return leaves, unreached


def is_leaf(module: nn.Module) -> bool:
    """True if the module's forward is exactly one of the table's."""
    return _builder(module) is not None and not (isinstance(module, _CONVS) and module.padding_mode != "zeros")


def leaf_graph(module: nn.Module) -> fx.Graph:
    """The forward of a leaf as a graph: placeholder, get_attr weight and bias, one GEMM node, a tuple of one output."""
    builder = _builder(module)
    assert builder is not None
    graph = fx.Graph()
    x = graph.placeholder(next(name for name in inspect.signature(type(module).forward).parameters if name != "self"))
    weight = graph.get_attr("weight")
    bias = graph.get_attr("bias") if getattr(module, "bias", None) is not None else None
    graph.output((builder(graph, module, (x, weight, bias)),))
    return graph


def _linear(graph: fx.Graph, module: Any, operands: tuple[Any, ...]) -> fx.Node:
    return graph.call_function(torch._C._nn.linear, operands)  # what F.linear is until ZeRO-3 replaces it


def _linear_kn(graph: fx.Graph, module: Any, operands: tuple[Any, ...]) -> fx.Node:
    return graph.call_function(linear_kn, operands)


def _conv(function: Callable[..., Any]) -> Callable[[fx.Graph, Any, tuple[Any, ...]], fx.Node]:
    def build(graph: fx.Graph, module: Any, operands: tuple[Any, ...]) -> fx.Node:
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        return graph.call_function(function, (*operands, *geometry))

    return build


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UNREACHED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.modules.conv._ConvTransposeNd, nn.Bilinear)
_Builder = Callable[[fx.Graph, Any, tuple[Any, ...]], fx.Node]
_BUILDERS: dict[type[nn.Module], tuple[str, _Builder]] = {
    nn.Linear: ("linear", _linear),
    nn.Conv1d: ("conv1d", _conv(F.conv1d)),
    nn.Conv2d: ("conv2d", _conv(F.conv2d)),
    nn.Conv3d: ("conv3d", _conv(F.conv3d)),
}


def _row(module: nn.Module) -> tuple[str, _Builder] | None:
    transformers = sys.modules.get("transformers.pytorch_utils")  # a model can hold its Conv1D only if this is loaded
    rows = {**_BUILDERS, transformers.Conv1D: ("linear", _linear_kn)} if transformers else _BUILDERS
    for kind, row in rows.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return row
    return None


def _builder(module: nn.Module) -> _Builder | None:
    row = _row(module)
    return row[1] if row else None


def _op(module: nn.Module) -> str:
    row = _row(module)
    assert row is not None
    return row[0]


def _sizes(module: Any) -> tuple[int, int]:
    """(n, k) of the weight's matrix, from the module's attributes and not its weight, which may be partitioned away."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, _CONVS):
        window = 1
        for extent in module.kernel_size:
            window *= extent
        return module.out_channels, module.in_channels // module.groups * window
    return module.nf, module.nx
