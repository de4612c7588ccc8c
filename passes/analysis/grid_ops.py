"""Grid ops: which operations give the cast of their result when they are run on casts of their inputs.

    view    reshape, flatten, unsqueeze: the same elements in the same order
    layout  transpose, permute, expand, slice: other order, some of them, or some of them twice
    cut     relu: cast(relu(x)) == relu(cast(x)), because a cast is monotone and keeps 0
    pool    max-pool: cast(max(a, b)) == max(cast(a), cast(b)), because a cast is monotone
    join    cat, stack: of casts that share everything

Not here: a + b. A cast of the sum rounds once where the sum of casts has rounded twice, and the sum of two grid values
is in general on no grid (448 + 448 in e4m3), so it would have to be cast again: it is never the same bits for fewer
bytes.

A cast gives a contiguous tensor; so does every op here, since the order of a GEMM's additions may hang on strides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import map_arg

from passes.ir.gemm_nodes import argument
from passes.ir.types import META
from runtime.numerics.format_kinds import LookupFormat
from runtime.numerics.formats import get_format
from runtime.numerics.specs import QuantSpec
from runtime.quantize.storage import storage_dtype

Kind = Literal["view", "layout", "cut", "pool", "join"]


@dataclass(frozen=True)
class GridOp:
    """One node read as such an op."""

    kind: Kind
    node: fx.Node
    inputs: tuple[fx.Node, ...]
    """In the order in which the node names them."""

    def replay(self, graph: fx.Graph, images: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """The op on what stands for its inputs, made where the graph inserts nodes."""
        named = dict(zip(_tensors_of(self.node), (images[each] for each in self.inputs)))
        if self.node.target is torch.Tensor.contiguous:
            return graph.call_function(torch.Tensor.contiguous, (images[self.inputs[0]],))
        args = map_arg(self.node.args, lambda each: named.get(each, each))
        kwargs = map_arg(self.node.kwargs, lambda each: named.get(each, each))
        # what torch can view in x's strides it can view in those of a contiguous tensor
        replayed = graph.call_function(self.node.target, args, kwargs)  # type: ignore[arg-type]
        if self.kind == "layout":
            replayed = graph.call_function(torch.Tensor.contiguous, (replayed,))
        return replayed


def read_grid_op(node: fx.Node) -> GridOp | None:
    """The node as an op of the list above, or None."""
    if node.op != "call_function":
        return None
    kind, inputs = _kind(node), tuple(_tensors_of(node))
    return GridOp(kind, node, inputs) if kind and inputs else None


def why_not_on_grid(op: GridOp, spec: QuantSpec, finite: bool, sees_zero_signs: bool) -> str | None:
    """Why casts of `spec` do not move through the op, or None. `finite`: no activation is NaN. `sees_zero_signs`: some
    reader of the cast tells -0 from 0; an lp.gemm does not, whose sums begin at +0.
    """
    if spec.is_block:
        return f"{spec.format} scales by blocks, which would hold other elements"
    if spec.is_range:
        return f"{spec.format} has the range of what is cast, which would hold other elements"
    if spec.rounding == "stochastic":
        return "stochastic bits go by the place of an element"
    if op.kind not in ("cut", "pool"):
        return None
    row = get_format(spec.format)
    if isinstance(row, LookupFormat):
        return f"nothing says that {spec.format} has a 0"
    has_minus_zero = row.has_negative_zero
    if has_minus_zero and sees_zero_signs:
        return "a small negative number is cast to -0, where relu and max-pool give +0"
    if op.kind == "pool" and not finite and not storage_dtype(spec.format).is_floating_point:
        return f"{spec.format} has no NaN, which a window should have that holds one; finite=true says that none does"
    return None


def moves_scale(op: GridOp, spec: QuantSpec, is_nonnegative: bool) -> bool:
    """Whether the scale of the result's cast follows from the input, without the result. `is_nonnegative`: the inputs
    are.
    """
    if spec.scale is None:
        return spec.is_elementwise
    if spec.scale.rule == "sawb":
        return False
    match op.kind, spec.scale.granularity:
        case "view" | "cut", "tensor":
            return True
        case "layout", "tensor":
            return op.node.target in (*_PERMUTATIONS, torch.Tensor.expand)
        case "pool", "tensor":
            return is_nonnegative and _covers(op.node)
        case "cut", "row" | "column":
            return elements(op.node) is not None and len(shape_of(op.node)) > 1
        case "view", "row" | "column":
            return _keeps_rows(op)
        case _:
            return False


def scale_behind(graph: fx.Graph, op: GridOp, scale: fx.Node, spec: QuantSpec) -> fx.Node:
    """The scale of the result's cast, from that of the input's, made where the graph inserts nodes."""
    if op.kind != "view" or spec.scale is None or spec.scale.granularity == "tensor":
        return scale
    if spec.scale.granularity == "column":
        return graph.call_function(torch.Tensor.reshape, (scale, *(1,) * (len(shape_of(op.node)) - 1), -1))
    name, args = op.node.target, op.node.args
    if name in _RESHAPES:  # the sizes but the last, and 1
        sizes = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        return graph.call_function(torch.Tensor.reshape, (scale, *sizes[:-1], 1))
    return op.replay(graph, {op.inputs[0]: scale})


def elements(node: fx.Node) -> int | None:
    """How many, in the example call; None for what is no floating-point tensor."""
    meta = node.meta.get(META)
    if meta is None or not hasattr(meta, "dtype") or not meta.dtype.is_floating_point:
        return None
    return prod(meta.shape)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of a node that `elements` knows."""
    return tuple(node.meta[META].shape)


def _kind(node: fx.Node) -> Kind | None:
    kind = _KINDS.get(node.target) if node.op == "call_function" else None
    if kind == "cut" and argument(node, 1, "inplace", False):
        return None
    if kind == "pool" and argument(node, 6, "return_indices", False):
        return None
    is_dtype = any(isinstance(each, torch.dtype) for each in (*node.args, *node.kwargs.values()))
    is_picked = node.target is torch.Tensor.__getitem__ and not _is_slice(node.args[1])
    return None if is_dtype or is_picked else kind


def _is_slice(index: Any) -> bool:
    """Whether x[index] is made of slices, numbers and None, and not of tensors."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(each is None or each is ... or type(each) in (int, slice) for each in parts)


def _tensors_of(call: fx.Node) -> list[fx.Node]:
    """The operands that are not sizes."""
    first = call.args[0] if call.args else None
    found = first if isinstance(first, (list, tuple)) else [first]
    return [each for each in found if isinstance(each, fx.Node)] if all(map(_is_node, found)) else []


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _keeps_rows(op: GridOp) -> bool:
    """Whether a view leaves the last dim alone, so that each row of the result is a row of the input."""
    if not elements(op.inputs[0]) or not elements(op.node):
        return False
    source, result = shape_of(op.inputs[0]), shape_of(op.node)
    if not source or not result or source[-1] != result[-1] or source[-1] == 1:
        return False
    if op.node.target in (*_RESHAPES, torch.Tensor.contiguous):
        return True
    start, end = argument(op.node, 1, "start_dim", 0), argument(op.node, 2, "end_dim", -1)
    if op.node.target in (torch.flatten, torch.Tensor.flatten):
        return end % len(source) < len(source) - 1 and start % len(source) <= end % len(source)
    is_unsqueeze = op.node.target in (torch.unsqueeze, torch.Tensor.unsqueeze)
    return is_unsqueeze and argument(op.node, 1, "dim") % len(result) < len(result) - 1


def _covers(call: fx.Node) -> bool:
    """Whether every element is in a window of a max-pool, whatever the size of its input: windows meet, none is
    dilated, and what a last window may fall short by (stride - 1) is padding.
    """
    kernel, stride, padding, dilation = (
        argument(call, number, name, default)
        for number, name, default in (
            (1, "kernel_size", None), (2, "stride", None), (3, "padding", 0), (4, "dilation", 1),
        )
    )  # fmt: skip
    num_dims = {F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3}[call.target]  # type: ignore[index]
    given = (kernel, stride or kernel, padding, dilation)
    sizes = [each if isinstance(each, (tuple, list)) else [each] * num_dims for each in given]
    return all(d == 1 and s <= k and p >= s - 1 for k, s, p, d in zip(*sizes))


_RESHAPES = (torch.Tensor.view, torch.Tensor.reshape, torch.reshape)
_PERMUTATIONS = (torch.Tensor.transpose, torch.transpose, torch.Tensor.permute, torch.permute, torch.Tensor.t, torch.t)
_KINDS: dict[Any, Kind] = {
    **dict.fromkeys(
        (
            *_RESHAPES, torch.Tensor.flatten, torch.flatten, torch.Tensor.unflatten, torch.Tensor.contiguous,
            torch.Tensor.squeeze, torch.squeeze, torch.Tensor.unsqueeze, torch.unsqueeze,
        ),
        "view",
    ),
    **dict.fromkeys((*_PERMUTATIONS, torch.Tensor.expand, torch.Tensor.__getitem__), "layout"),
    **dict.fromkeys((torch.relu, torch.Tensor.relu, F.relu), "cut"),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), "pool"),
    **dict.fromkeys((torch.cat, torch.concat, torch.stack), "join"),
}  # fmt: skip
