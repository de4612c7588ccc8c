"""Leaves: the modules that hold a GEMM's weight. Each gets a graph of its own, with no recording: the floor under every
capture.

    torch.nn.Linear            linear(input, weight, bias)
    torch.nn.Conv1d/2d/3d      convNd(input, weight, bias, ...)      other padding than zeros is a pad before it
    transformers' Conv1D       linear_kn(x, weight, bias)            weight is stored as (in, out)

Modules that are one fused function of several products get a forward of ours that calls each product by name, and one
graph and one site per product:

    ConvTranspose1d/2d/3d      the module's own name
    MultiheadAttention         .in_proj .qk .pv .out_proj
    RNN, LSTM, GRU             .ih_l0 .hh_l0 (.hr_l0) .ih_l0_reverse ...
    RNNCell, LSTMCell, GRUCell .ih .hh
    experts of transformers    .gate_up_proj .down_proj              one product per expert in each

A subclass counts only if it did not write a forward of its own. What holds GEMMs and is not here is listed as
unreached, by name.
"""

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.nn.utils.parametrize import is_parametrized

from lpcompile.frontends.conv_geometry import per_dim, read_geometry
from lpcompile.frontends.leaves.experts import expert_weights, experts, is_experts
from lpcompile.frontends.leaves.multihead_attention import multihead_attention
from lpcompile.frontends.leaves.recurrent import recurrent, recurrent_cell
from passes.ir.program import REPEATED, WEIGHT
from runtime.ops.contractions import ConvGeometry, linear_kn


@dataclass(frozen=True)
class Leaf:
    """One GEMM of a GEMM-bearing leaf. `index` is its place in registration order, None for a product of activations;
    n and k are the sizes of its weight's matrix. `part` is which of a module's products it is, "" if there is one.
    """

    path: str
    op: str
    index: int | None
    n: int | None
    k: int | None
    part: str = ""
    is_repeated: bool = False
    kind: str = "linear"
    """A row of runtime.ops.layer.KINDS, or conv."""
    is_grouped: bool = False
    """One product per expert."""

    @property
    def name(self) -> str:
        """The name of the site."""
        return ".".join(filter(None, (self.path, self.part)))


@dataclass(frozen=True)
class Unreached:
    """A module that multiplies matrices where no graph of ours sees it, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Part:
    """One product of a composite leaf: its name, the policy's op, the sizes of its weight's matrix if it has one, and
    whether one forward runs it once per time step.
    """

    name: str
    op: str
    n: int | None = None
    k: int | None = None
    is_repeated: bool = False
    kind: str = "linear"
    is_grouped: bool = False


CompositeForward = Callable[..., Any]
"""`forward(module, products, *args, **kwargs)`: the module's forward, each product called by its part's name."""


@dataclass(frozen=True)
class _Composite:
    matches: Callable[[nn.Module], bool]
    parts: Callable[[Any], list[Part]]
    forward: CompositeForward


def find_leaves(model: nn.Module) -> tuple[list[Leaf], list[Unreached]]:
    """Every leaf, in registration order, and every module known to hold GEMMs that are not reached."""
    leaves: list[Leaf] = []
    unreached: list[Unreached] = []
    inside: tuple[str, ...] = ()
    num_weights = 0
    for path, module in model.named_modules():
        if path.startswith(inside) and inside:
            continue
        if isinstance(module, _UNREACHED):
            unreached.append(Unreached(path, f"{type(module).__name__} computes its products in a way of its own"))
        for part in _parts(module):
            index = None if part.n is None else num_weights
            leaves.append(
                Leaf(path, part.op, index, part.n, part.k, part.name, part.is_repeated, part.kind, part.is_grouped)
            )
            num_weights += part.n is not None
        if _composite(module) is not None:
            inside += (f"{path}." if path else "",)
    return leaves, unreached


def is_leaf(module: nn.Module) -> bool:
    """True if the module's forward is exactly one of the table's."""
    return _row(module) is not None or _composite(module) is not None


def is_of_leaf_kind(module: nn.Module) -> bool:
    """Whether it is a layer that could be a leaf, were it as torch wrote it."""
    return isinstance(module, (*_BUILDERS, *_TRANSPOSED_CONVS, nn.MultiheadAttention, *_RECURRENT, *_CELLS))


def is_composite(module: nn.Module) -> bool:
    """Whether a leaf holds several products, or has children of its own to hold them."""
    return _composite(module) is not None


def leaf_forward(module: nn.Module) -> CompositeForward:
    """The forward by parts of any leaf, as `forward(module, products, ...)`."""
    composite, row = _composite(module), _row(module)
    if composite is not None:
        return composite.forward
    assert row is not None
    return row[2]


def composite_forward(module: nn.Module) -> CompositeForward | None:
    """The forward by parts of a composite leaf; None for a leaf whose graph is its forward."""
    row = _composite(module)
    return row.forward if row else None


def part_graph(module: nn.Module, leaf: Leaf) -> fx.Graph:
    """The graph of one GEMM of a leaf; operands of a composite's product are placeholders."""
    if _composite(module) is None:
        return leaf_graph(module)
    if is_experts(module):
        return _experts_graph(module, leaf)
    graph = fx.Graph()
    names = ("a", "b") if leaf.op == "matmul" else ("x", "weight", "bias")
    operands = tuple(graph.placeholder(name) for name in names)
    operands[1].meta[WEIGHT] = leaf.op != "matmul"
    _note_weight(operands[1], module)
    if leaf.op == "linear":
        node = graph.call_function(torch._C._nn.linear, operands)
    elif leaf.op == "matmul":
        node = graph.call_function(torch.matmul, operands)
    else:
        node = graph.call_function(_TRANSPOSED[leaf.op], (*operands, *_transposed_geometry(module)))
    node.meta[REPEATED] = leaf.is_repeated
    graph.output((node,))
    return graph


def _experts_graph(module: Any, leaf: Leaf) -> fx.Graph:
    """All experts of one product: decompose-products makes it one GEMM per expert."""
    num_experts, n, k = expert_weights(module)[leaf.part]
    graph = fx.Graph()
    x, weight, ends = (graph.placeholder(name) for name in ("x", "weight", "ends"))
    weight.meta[WEIGHT] = True
    matrices = weight if module.is_transposed else graph.call_function(torch.transpose, (weight, -2, -1))
    matrices.meta["tensor_meta"] = _extract_tensor_metadata(torch.empty(num_experts, k, n, device="meta"))
    graph.output((graph.call_function(F.grouped_mm, (x, matrices), {"offs": ends}),))
    return graph


def leaf_graph(module: nn.Module) -> fx.Graph:
    """The forward of a leaf as a graph: placeholder, get_attr weight and bias, one GEMM node, a tuple of one output."""
    row = _row(module)
    assert row is not None
    graph = fx.Graph()
    x = graph.placeholder(next(name for name in inspect.signature(type(module).forward).parameters if name != "self"))
    weight = graph.get_attr("weight")
    _note_weight(weight, module)
    bias = graph.get_attr("bias") if has_tensor(module, "bias") else None
    graph.output((row[1](graph, module, (x, weight, bias)),))
    return graph


def has_tensor(module: nn.Module, name: str) -> bool:
    """Whether the module has a tensor of this name. One that a parametrization computes is not computed for that."""
    return is_parametrized(module, name) or getattr(module, name, None) is not None


def _note_weight(node: fx.Node, module: nn.Module) -> None:
    """What passes ask of a weight: its sizes and its dtype. One that is partitioned away has none."""
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.numel():
        node.meta["tensor_meta"] = _extract_tensor_metadata(weight)


def _linear(graph: fx.Graph, module: Any, operands: tuple[Any, ...]) -> fx.Node:
    return graph.call_function(torch._C._nn.linear, operands)  # what F.linear is until ZeRO-3 replaces it


def _linear_kn(graph: fx.Graph, module: Any, operands: tuple[Any, ...]) -> fx.Node:
    return graph.call_function(linear_kn, operands)


def _conv(function: Callable[..., Any]) -> Callable[[fx.Graph, Any, tuple[Any, ...]], fx.Node]:
    def build(graph: fx.Graph, module: Any, operands: tuple[Any, ...]) -> fx.Node:
        x, weight, bias = operands
        padding = _numbers(module)
        if padding is None:
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = graph.call_function(F.pad, (x, tuple(module._reversed_padding_repeated_twice)), {"mode": mode})
            padding = (0,) * len(module.dilation)
        return graph.call_function(function, (x, weight, bias, module.stride, padding, module.dilation, module.groups))

    return build


def _numbers(module: Any) -> tuple[int, ...] | None:
    """The padding of a convolution as one number per dim; None where a pad before it is needed."""
    if module.padding_mode != "zeros":
        return None
    both_sides = module._reversed_padding_repeated_twice[::-1]
    before, after = both_sides[1::2], both_sides[::2]
    return tuple(before) if before == after else None


def _linear_forward(module: Any, products: Any, input: Tensor) -> Tensor:
    return products[""](input, module.weight, module.bias)


def _conv1d_forward(module: Any, products: Any, x: Tensor) -> Tensor:
    """Of transformers' Conv1D, whose argument has this name."""
    return products[""](x, module.weight, module.bias)


def _conv_forward(module: Any, products: Any, input: Tensor) -> Tensor:
    """As nn.ConvNd._conv_forward: padding by another mode than zeros comes before."""
    weight, padding = module.weight, module.padding
    if module.padding_mode != "zeros":
        input, padding = F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    geometry = module.stride, padding, module.dilation, module.groups
    input, read = read_geometry(input, weight, weight.dim() - 2, *geometry)
    return products[""](input, weight, module.bias, geometry=read)


def _transposed(module: Any, products: Any, input: Tensor, output_size: Any = None) -> Tensor:
    """The forward of nn.ConvTransposeNd."""
    weight = module.weight  # read once: it may be computed
    dims = weight.dim() - 2
    lists = [[*per_dim(value, dims)] for value in (module.stride, module.padding, module.kernel_size, module.dilation)]
    more = module._output_padding(input, output_size, *lists[:3], dims, lists[3])
    stride, padding, _, dilation = map(tuple, lists)
    geometry = ConvGeometry(stride, padding, dilation, module.groups, per_dim(more, dims))
    return products[""](input, weight, module.bias, geometry=geometry)


def _transposed_geometry(module: Any) -> tuple[Any, ...]:
    return module.stride, module.padding, module.output_padding, module.groups, module.dilation


def _transposed_parts(module: Any) -> list[Part]:
    window = math.prod(module.kernel_size)
    n, k = module.out_channels, module.in_channels // module.groups * window
    return [Part("", f"conv_transpose{len(module.stride)}d", n, k, kind="conv")]


def _attention_parts(module: nn.MultiheadAttention) -> list[Part]:
    width = module.embed_dim
    in_proj, out_proj = Part("in_proj", "linear", 3 * width, width), Part("out_proj", "linear", width, width)
    return [in_proj, Part("qk", "matmul", kind="matmul"), Part("pv", "matmul", kind="matmul"), out_proj]


def _recurrent_parts(module: nn.RNNBase) -> list[Part]:
    parts = []
    for name, _ in module.named_parameters(recurse=False):
        if name.startswith("weight_"):
            part = name.removeprefix("weight_")
            parts.append(Part(part, "linear", *_recurrent_sizes(module, name), is_repeated=not part.startswith("ih")))
    return parts


def _recurrent_sizes(module: Any, name: str) -> tuple[int, int]:
    """(n, k) from the module's attributes: its weights may be partitioned away."""
    hidden, proj, directions = module.hidden_size, module.proj_size, 1 + module.bidirectional
    if "_hr_" in name:
        return proj, hidden
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1) * hidden
    if "_hh_" in name:
        return gates, proj or hidden
    return gates, module.input_size if "_l0" in name else (proj or hidden) * directions


def _expert_parts(module: nn.Module) -> list[Part]:
    kind = "linear_kn" if module.is_transposed else "linear"
    sizes = expert_weights(module).items()
    return [Part(name, "linear", n, k, kind=kind, is_grouped=True) for name, (_, n, k) in sizes]


def _cell_parts(module: nn.RNNCellBase) -> list[Part]:
    gates = {nn.LSTMCell: 4, nn.GRUCell: 3}.get(type(module), 1) * module.hidden_size
    return [Part("ih", "linear", gates, module.input_size), Part("hh", "linear", gates, module.hidden_size)]


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UNREACHED = (nn.Bilinear,)
_TRANSPOSED = {
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
}

_Builder = Callable[[fx.Graph, Any, tuple[Any, ...]], fx.Node]
_BUILDERS: dict[type[nn.Module], tuple[str, _Builder, CompositeForward, str]] = {
    nn.Linear: ("linear", _linear, _linear_forward, "linear"),
    nn.Conv1d: ("conv1d", _conv(F.conv1d), _conv_forward, "conv"),
    nn.Conv2d: ("conv2d", _conv(F.conv2d), _conv_forward, "conv"),
    nn.Conv3d: ("conv3d", _conv(F.conv3d), _conv_forward, "conv"),
}

_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def _has_forward_of(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: any(isinstance(module, kind) and _is_as_torch_wrote_it(module, kind) for kind in kinds)


def _is_as_torch_wrote_it(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's whole path to its product is that of `kind`: no subclass wrote a part of it, nor did anyone
    put one on the instance.
    """
    return all(
        getattr(type(module), name) is getattr(kind, name) and name not in vars(module)
        for name in _PATH
        if hasattr(kind, name)
    )


_PATH = ("forward", "_conv_forward", "_output_padding", "merge_masks", "check_forward_args")
"""The methods that lead to a product, where a kind has them."""

_COMPOSITES = (
    _Composite(_has_forward_of(*_TRANSPOSED_CONVS), _transposed_parts, _transposed),
    _Composite(_has_forward_of(nn.MultiheadAttention), _attention_parts, multihead_attention),
    _Composite(_has_forward_of(*_RECURRENT), _recurrent_parts, recurrent),
    _Composite(_has_forward_of(*_CELLS), _cell_parts, recurrent_cell),
    _Composite(is_experts, _expert_parts, experts),
)


def _row(module: nn.Module) -> tuple[str, _Builder, CompositeForward, str] | None:
    transformers = sys.modules.get("transformers.pytorch_utils")  # a model can hold its Conv1D only if this is loaded
    rows = (
        {**_BUILDERS, transformers.Conv1D: ("linear", _linear_kn, _conv1d_forward, "linear_kn")}
        if transformers
        else _BUILDERS
    )
    for kind, row in rows.items():
        if isinstance(module, kind) and _is_as_torch_wrote_it(module, kind):
            return row
    return None


def _composite(module: nn.Module) -> _Composite | None:
    return next((row for row in _COMPOSITES if row.matches(module)), None)


def _parts(module: nn.Module) -> list[Part]:
    composite, row = _composite(module), _row(module)
    if composite is not None:
        return composite.parts(module)
    return [Part("", row[0], *_sizes(module), kind=row[3])] if row else []


def _sizes(module: Any) -> tuple[int, int]:
    """(n, k) of the weight's matrix, from the module's attributes and not its weight, which may be partitioned away."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, _CONVS):
        return module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)
    return module.nf, module.nx
