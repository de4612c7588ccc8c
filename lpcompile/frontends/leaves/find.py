"""Leaves: the modules that hold a GEMM's weight. Each gets a graph of its own, with no recording: the floor under every
capture.

    torch.nn.Linear            linear(input, weight, bias)
    torch.nn.Conv1d/2d/3d      convNd(input, weight, bias, ...)      other padding than zeros is a pad before it
    transformers' Conv1D       linear_kn(x, weight, bias)            weight is stored as (in, out)

    ConvTranspose1d/2d/3d      conv_transposeNd(input, weight, bias, ...)

Modules that are one fused function of several products get a forward of ours that calls each product by name, and one
site per product:

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
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.fx.proxy import GraphAppendingTracer
from torch.nn.utils.parametrize import is_parametrized

from lpcompile.frontends.intercept.weight_reads import names_in
from lpcompile.frontends.leaves.experts import expert_weights, experts, is_experts
from lpcompile.frontends.leaves.multihead_attention import multihead_attention
from lpcompile.frontends.leaves.recurrent import recurrent, recurrent_cell
from passes.ir.conv_geometry import per_dim, read_geometry
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
    """Whether one forward runs it once per time step."""
    kind: str = "linear"
    """A row of runtime.ops.layer.KINDS, or conv."""
    is_grouped: bool = False
    """One product per expert."""

    @property
    def name(self) -> str:
        """The name of the site."""
        return ".".join(filter(None, (self.path, self.part)))


LeafRun = Callable[..., Any]
"""`forward(module, products, *args, **kwargs)`: the module's forward, each product called by its part's name."""


@dataclass(frozen=True)
class _Kind:
    """Leaves of one kind: which modules they are, their products, and their forward."""

    matches: Callable[[nn.Module], bool]
    parts: Callable[[Any], list[Leaf]]
    forward: LeafRun


def find_leaves(model: nn.Module) -> tuple[list[Leaf], dict[str, str]]:
    """Every leaf, in registration order, and every module known to hold GEMMs that are not reached, by path, with the
    reason.
    """
    leaves: list[Leaf] = []
    unreached: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    num_weights = 0
    for path, module in model.named_modules():
        if path.startswith(inside) and inside:
            continue
        if isinstance(module, _UNREACHED):
            unreached[path] = f"{type(module).__name__} computes its products in a way of its own"
        kind = _kind_of(module)
        if kind is None and isinstance(module, _RECURRENT):
            what = "is not as torch wrote it, or computes a weight"
            unreached[path] = f"{type(module).__name__} {what}, and its products are torch's own"
        for part in kind.parts(module) if kind else ():
            leaves.append(replace(part, path=path, index=None if part.n is None else num_weights))
            num_weights += part.n is not None
        if is_composite(module):
            inside += (f"{path}." if path else "",)
    return leaves, unreached


def is_of_leaf_kind(module: nn.Module) -> bool:
    """Whether it is a layer that could be a leaf, were it as torch wrote it."""
    return isinstance(module, (nn.Linear, *_CONVS, *_TRANSPOSED_CONVS, nn.MultiheadAttention, *_RECURRENT, *_CELLS))


def is_composite(module: nn.Module) -> bool:
    """Whether it is a leaf of several products."""
    kind = _kind_of(module)
    return kind is not None and any(leaf.part for leaf in kind.parts(module))


def leaf_forward(module: nn.Module) -> LeafRun:
    """The forward by parts of a leaf, as `forward(module, products, ...)`."""
    kind = _kind_of(module)
    assert kind is not None
    return kind.forward


def leaf_graph(module: nn.Module) -> fx.Graph:
    """The forward of a leaf of one product as a graph: placeholder, get_attr weight and bias, a pad where one is
    needed, one GEMM node, a tuple of one output.
    """
    kind, graph = _kind_of(module), fx.Graph()
    assert kind is not None
    (leaf,) = kind.parts(module)
    name = next(name for name in inspect.signature(type(module).forward).parameters if name != "self")
    x = fx.Proxy(graph.placeholder(name), GraphAppendingTracer(graph))
    y = kind.forward(_Symbolic(module, x.tracer), {"": partial(_record, leaf)}, x)
    graph.output((y.node,))
    return graph


class _Symbolic:
    """A leaf as its forward reads it, whose weight and bias are nodes of a graph."""

    def __init__(self, module: nn.Module, tracer: fx.proxy.TracerBase) -> None:
        self._module = module
        self.weight = fx.Proxy(tracer.graph.get_attr("weight"), tracer)
        weight = module._parameters.get("weight")
        if type(weight) is nn.Parameter and weight.numel():  # one that is partitioned away has no sizes
            self.weight.node.meta["tensor_meta"] = _extract_tensor_metadata(weight)
        self.bias = fx.Proxy(tracer.graph.get_attr("bias"), tracer) if _has_bias(module) else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _has_bias(module: nn.Module) -> bool:
    """One that a parametrization computes is not computed for that."""
    return is_parametrized(module, "bias") or getattr(module, "bias", None) is not None


def _record(
    leaf: Leaf, x: fx.Proxy, weight: fx.Proxy, bias: fx.Proxy | None, geometry: ConvGeometry | None = None
) -> fx.Proxy:
    """In the place of a leaf's product: the node that stands for it."""
    more: tuple[Any, ...] = ()
    if geometry is not None:
        g = geometry
        rest = (g.output_padding, g.groups, g.dilation) if g.is_transposed else (g.dilation, g.groups)
        more = (g.stride, g.padding, *rest)
    operands = (x.node, weight.node, None if bias is None else bias.node, *more)
    functions = {"linear": torch._C._nn.linear, "linear_kn": linear_kn}  # the first is what F.linear is before ZeRO-3
    return fx.Proxy(x.tracer.graph.call_function(functions.get(leaf.kind) or getattr(F, leaf.op), operands), x.tracer)


def _linear_forward(module: Any, products: Any, input: Tensor) -> Tensor:
    return products[""](input, module.weight, module.bias)


def _conv1d_forward(module: Any, products: Any, x: Tensor) -> Tensor:
    """Of transformers' Conv1D, whose argument has this name."""
    return products[""](x, module.weight, module.bias)


def _conv_forward(module: Any, products: Any, input: Tensor) -> Tensor:
    """As nn.ConvNd._conv_forward: padding by another mode than zeros comes before."""
    padding = module.padding
    if module.padding_mode != "zeros":
        input, padding = F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    before, geometry = read_geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)
    input = F.pad(input, before) if before else input
    return products[""](input, module.weight, module.bias, geometry=geometry)


def _transposed_forward(module: Any, products: Any, input: Tensor, output_size: Any = None) -> Tensor:
    """The forward of nn.ConvTransposeNd."""
    dims = len(module.kernel_size)
    lists = [[*per_dim(value, dims)] for value in (module.stride, module.padding, module.kernel_size, module.dilation)]
    more = module._output_padding(input, output_size, *lists[:3], dims, lists[3])
    stride, padding, _, dilation = map(tuple, lists)
    geometry = ConvGeometry(stride, padding, dilation, module.groups, per_dim(more, dims))
    return products[""](input, module.weight, module.bias, geometry=geometry)


def _product(op: str, n: int | None = None, k: int | None = None, part: str = "", **more: Any) -> list[Leaf]:
    """One product of a leaf, which find_leaves gives its path and place. The sizes are from the module's attributes and
    not its weights, which may be partitioned away.
    """
    return [Leaf("", op, None, n, k, part, **more)]


def _linear_parts(module: nn.Linear) -> list[Leaf]:
    return _product("linear", module.out_features, module.in_features)


def _conv_parts(module: Any) -> list[Leaf]:
    window, transposed = math.prod(module.kernel_size), "_transpose" if module.transposed else ""
    sizes = module.out_channels, module.in_channels // module.groups * window
    return _product(f"conv{transposed}{len(module.stride)}d", *sizes, kind="conv")


def _attention_parts(module: nn.MultiheadAttention) -> list[Leaf]:
    width = module.embed_dim
    matmuls = [leaf for part in ("qk", "pv") for leaf in _product("matmul", part=part, kind="matmul")]
    return [
        *_product("linear", 3 * width, width, "in_proj"), *matmuls, *_product("linear", width, width, "out_proj")
    ]  # fmt: skip


def _recurrent_parts(module: nn.RNNBase) -> list[Leaf]:
    parts = []
    for name, _ in module.named_parameters(recurse=False):
        if name.startswith("weight_"):
            part = name.removeprefix("weight_")
            sizes = _recurrent_sizes(module, name)
            parts += _product("linear", *sizes, part, is_repeated=not part.startswith("ih"))
    return parts


def _recurrent_sizes(module: Any, name: str) -> tuple[int, int]:
    hidden, proj, directions = module.hidden_size, module.proj_size, 1 + module.bidirectional
    if "_hr_" in name:
        return proj, hidden
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1) * hidden
    if "_hh_" in name:
        return gates, proj or hidden
    return gates, module.input_size if "_l0" in name else (proj or hidden) * directions


def _expert_parts(module: nn.Module) -> list[Leaf]:
    kind = "linear_kn" if module.is_transposed else "linear"
    sizes = expert_weights(module).items()
    return [leaf for part, each in sizes for leaf in _product("linear", *each, part, kind=kind, is_grouped=True)]


def _cell_parts(module: nn.RNNCellBase) -> list[Leaf]:
    gates = {nn.LSTMCell: 4, nn.GRUCell: 3}.get(type(module), 1) * module.hidden_size
    sizes = {"ih": module.input_size, "hh": module.hidden_size}
    return [leaf for part, k in sizes.items() for leaf in _product("linear", gates, k, part)]


def _is_as_torch_wrote_it(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Whether a module's whole path to its product is that of one of the kinds: no subclass wrote a part of it, nor did
    anyone put one on the instance; and its weights are parameters.
    """

    def matches(module: nn.Module) -> bool:
        return any(isinstance(module, kind) and _has_path_of(kind, module) for kind in kinds)

    return matches


def _has_path_of(kind: Any, module: nn.Module) -> bool:
    own = vars(module)
    if not all(getattr(type(module), name) is getattr(kind, name) and name not in own for name in _path(kind)):
        return False
    if not isinstance(module, nn.RNNBase):
        return True
    # torch reads the weights in a list, we read them by name
    is_list = not hasattr(type(module), "_flat_weights")
    return is_list and all(module._parameters.get(name) is not None for name in module._flat_weights_names)


@lru_cache(maxsize=64)
def _path(kind: Any) -> frozenset[str]:
    """The methods that lead to the product of a kind: forward, and all that it names and they name."""
    names, waiting = set[str](), ["forward"]
    while waiting:
        name = waiting.pop()
        method = getattr(kind, name, None)
        is_of_all = name != "forward" and hasattr(nn.Module, name)
        if name in names or is_of_all or name == "flatten_parameters" or not isinstance(method, FunctionType):
            continue  # to lay the weights out another way changes no result
        names.add(name)
        waiting += names_in(inspect.unwrap(method).__code__)
    return frozenset(names)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    library = sys.modules.get("transformers.pytorch_utils")  # a model can hold its Conv1D only if this is loaded
    return library is not None and _is_as_torch_wrote_it(library.Conv1D)(module)


_UNREACHED = (nn.Bilinear,)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_KINDS = (
    _Kind(_is_as_torch_wrote_it(nn.Linear), _linear_parts, _linear_forward),
    _Kind(_is_as_torch_wrote_it(*_CONVS), _conv_parts, _conv_forward),
    _Kind(_is_transformers_conv1d, lambda m: _product("linear", m.nf, m.nx, kind="linear_kn"), _conv1d_forward),
    _Kind(_is_as_torch_wrote_it(*_TRANSPOSED_CONVS), _conv_parts, _transposed_forward),
    _Kind(_is_as_torch_wrote_it(nn.MultiheadAttention), _attention_parts, multihead_attention),
    _Kind(_is_as_torch_wrote_it(*_RECURRENT), _recurrent_parts, recurrent),
    _Kind(_is_as_torch_wrote_it(*_CELLS), _cell_parts, recurrent_cell),
    _Kind(is_experts, _expert_parts, experts),
)


def _kind_of(module: nn.Module) -> _Kind | None:
    return next((kind for kind in _KINDS if kind.matches(module)), None)
