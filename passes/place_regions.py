"""place-regions: where casts stand so that the fewest bytes move, by a minimum cut (passes/analysis/regions.py).

    %r = relu(%x)                     becomes      %q = lp.quantize(%x)
    %p = max_pool2d(%r, 2)                         %r = relu(%q)                       on grid values
    %q = lp.quantize(%p)                           %p = max_pool2d(%r, 2)
    %y = lp.gemm(%p, %w, %q, ...)                  %y = lp.gemm(lp.stand_in(%p), %w, %p, ...)

A cast moves only through what changes no bit of it (passes/analysis/grid_ops.py), within one epoch of its tensor
(passes/analysis/writes.py), and only if the graph then moves fewer bytes. A scale that is computed from what is cast
moves with it: the largest of relu(x) is relu(the largest of x), which is one number. Casts of one spec without a scale
are placed together; of a computed scale, those of one tensor.

In training the carrier of the gradient keeps the high-precision value alive, so a cast moves only to where it casts
less (above an expand, or once before several reshapes). `carriers=drop`, for inference, lets an lp.gemm take a stand-in
for the carrier, and leaves out the casts of BWD and GRAD; the graph then stands for the forward only where grad mode is
off.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from passes.analysis.grid_ops import (
    GridOp,
    elements,
    moves_scale,
    read_grid_op,
    scale_behind,
    shape_of,
    why_not_on_grid,
)
from passes.analysis.regions import Place, Value, bytes_moved, place
from passes.analysis.writes import epochs
from passes.cast_keys import QUANTIZE, SCALE, cast_spec
from passes.ir.operands import operands_of, set_operands
from passes.ir.program import Program
from passes.ir.types import META, tensor_meta, types_of
from passes.manager import Pass
from runtime.errors import PassError
from runtime.numerics.specs import QuantSpec
from runtime.ops.dialect import OPS
from runtime.ops.types import TensorType
from runtime.quantize.storage import storage_dtype

_GEMM, _STAND_IN, _DEQUANTIZE = OPS["lp.gemm"].run, OPS["lp.stand_in"].run, OPS["lp.dequantize"].run
_FWD_CASTS = ("fwd_lhs", "fwd_lhs_scale", "fwd_rhs", "fwd_rhs_scale")
_LATER_CASTS = ("bwd_rhs", "bwd_rhs_scale", "grad_lhs", "grad_lhs_scale")
"""Operands of lp.gemm: casts that FWD multiplies, and those that BWD and GRAD do."""


@dataclass(frozen=True)
class PlaceRegions(Pass):
    """`carriers=keep|drop`: whether gradients flow. `finite=true`: no activation is NaN, so int8 may be pooled."""

    name: ClassVar[str] = "place-regions"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "cast")
    carriers: str = "keep"
    finite: bool = False

    def __post_init__(self) -> None:
        if self.carriers not in ("keep", "drop"):
            raise PassError("no such way", where="place-regions{carriers}", expected="keep or drop", got=self.carriers)

    def run(self, program: Program) -> bool:
        changed = False
        for unit in program.units.values():
            if unit.kind == "module":
                is_dropping = self.carriers == "drop" and not _switches_grad_mode(unit.graph)
                regions = _Regions(unit.graph, is_dropping, self.finite)
                changed |= is_dropping and regions.leave_out_later_casts()
                for key in list(regions.demands()):
                    changed |= regions.move(key)
        return changed


@dataclass(frozen=True)
class _Key:
    """What the casts of one problem share: the spec and, if it has a scale, the tensor that the scale is of, which
    they all cast views of.
    """

    spec: QuantSpec
    scaled: fx.Node | None


class _Regions:
    """The casts of one graph."""

    def __init__(self, graph: fx.Graph, is_dropping: bool, finite: bool) -> None:
        self.graph, self.is_dropping, self.finite = graph, is_dropping, finite
        for node, kind in types_of(self.graph).items():  # what lp ops give, which nobody recorded
            if isinstance(kind, TensorType) and META not in node.meta:
                node.meta[META] = tensor_meta(kind)

    def leave_out_later_casts(self) -> bool:
        """Without gradients nobody reads the casts of BWD and GRAD that FWD does not read too."""
        changed = False
        for node in self.graph.find_nodes(op="call_function", target=_GEMM):
            if _has_later_casts_alone(node):
                set_operands(node, **dict.fromkeys(_LATER_CASTS))
                changed = True
        self._erase_unused_casts()
        return changed

    def demands(self) -> dict[_Key, list[fx.Node]]:
        """The casts by problem, in program order."""
        found: dict[_Key, list[fx.Node]] = defaultdict(list)
        for cast in self.graph.find_nodes(op="call_function", target=QUANTIZE):
            x, spec, scale = cast.args[0], cast_spec(cast), cast.args[1]
            assert isinstance(x, fx.Node)
            is_own = isinstance(scale, fx.Node) and scale.target is SCALE and scale.args[0] is x
            if not spec.is_identity and (is_own or scale is None) and elements(x):
                found[_Key(spec, self._viewed(x, spec) if is_own else None)].append(cast)
        return found

    def _viewed(self, node: fx.Node, spec: QuantSpec) -> fx.Node:
        """What a value is a view of, the scale of which follows."""
        op = read_grid_op(node)
        is_view = op is not None and op.kind == "view" and moves_scale(op, spec, is_nonnegative=False)
        return self._viewed(op.inputs[0], spec) if op is not None and is_view else node

    def move(self, key: _Key) -> bool:
        """Solve one problem and rewrite the graph, if that moves fewer bytes."""
        epoch_of = epochs(self.graph)
        demands = [each for each in self.demands().get(key, []) if epoch_of[each] == epoch_of[_value(each)]]
        ops = self._grid_ops(key, demands, epoch_of)
        if not ops:
            return False
        relevant = {each for op in ops.values() for each in (op.node, *op.inputs)} | {_value(each) for each in demands}
        nodes = [node for node in self.graph.nodes if node in relevant]
        values = self._values(key, nodes, ops, demands)
        places = place(values)
        before = [Place.BOTH_CAST if value.needs_low else Place.HIGH for value in values]
        if bytes_moved(values, places) >= bytes_moved(values, before):
            return False
        _Rewriter(self, key, ops, dict(zip(nodes, places))).run(demands)
        return True

    def _grid_ops(self, key: _Key, demands: list[fx.Node], epoch_of: Mapping[fx.Node, int]) -> dict[fx.Node, GridOp]:
        """The ops above the demands, as far as casts of this problem may move."""
        ops: dict[fx.Node, GridOp] = {}
        sees_zero_signs = not self.is_dropping or not all(map(_is_summed, demands))
        waiting = [*map(_value, demands)]
        while waiting:
            node = waiting.pop()
            op = None if node in ops else read_grid_op(node)
            if op is None or why_not_on_grid(op, key.spec, self.finite, sees_zero_signs) is not None:
                continue
            is_near = all(epoch_of[each] == epoch_of[node] and elements(each) for each in op.inputs)
            if is_near and elements(node) and moves_scale(op, key.spec, self._is_nonnegative(op.inputs[0])):
                ops[node] = op
                waiting += op.inputs
        return ops

    def _is_nonnegative(self, node: fx.Node) -> bool:
        """Whether the value is a relu, or such elements of one as a scale moves through."""
        if node.kwargs.get("activation") == "relu":
            return True
        op = read_grid_op(node)
        return op is not None and (op.kind == "cut" or (op.kind != "join" and self._is_nonnegative(op.inputs[0])))

    def _values(
        self, key: _Key, nodes: list[fx.Node], ops: Mapping[fx.Node, GridOp], demands: list[fx.Node]
    ) -> list[Value]:
        """The values as the minimum cut reads them, in bytes."""
        number = {node: at for at, node in enumerate(nodes)}
        wanted = {_value(each) for each in demands}

        def needs_high(node: fx.Node, user: fx.Node) -> bool:
            is_scale = user.target is SCALE and all(each in demands or each.target is _GEMM for each in user.users)
            return not (user in ops or user in demands or is_scale or self.is_carrier(user, node))

        low, values = storage_dtype(key.spec.format).itemsize, []
        for node in nodes:
            op, size, high = ops.get(node), elements(node) or 0, node.meta[META].dtype.itemsize
            read = sum(elements(each) or 0 for each in op.inputs) if op else 0
            is_computed = op is not None and op.kind not in ("view", "layout")
            is_copied = op is not None and op.kind == "layout"  # into contiguous order, as a cast does it
            is_free = node.target is _DEQUANTIZE and cast_spec(node) == key.spec and key.scaled is None
            values.append(
                Value(
                    inputs=tuple(number[each] for each in op.inputs) if op else (),
                    high=(size + read) * high if is_computed else 0,
                    low=None if op is None else (size + read) * low if is_computed else 2 * size * low * is_copied,
                    cast=0 if is_free else size * (high * (1 if key.scaled is None else 2) + low),
                    needs_high=op is None or any(needs_high(node, user) for user in node.users),
                    needs_low=node in wanted,
                )
            )
        return values

    def is_carrier(self, user: fx.Node, value: fx.Node) -> bool:
        """Whether `user` takes `value` for the gradient or for its sizes only, and could take a stand-in for it."""
        if not self.is_dropping:
            return False
        if user.target is _GEMM:
            return _roles_of(value, user) <= {"lhs", "rhs"}
        return user.target in _SIZES

    def _erase_unused_casts(self) -> None:
        for node in reversed(self.graph.nodes):
            if node.target in (QUANTIZE, SCALE) and not node.users:
                self.graph.erase_node(node)


class _Rewriter:
    """The nodes of a placement: casts where it casts, ops on grid values where it carries. Each image of a node stands
    right behind it.
    """

    def __init__(
        self, regions: _Regions, key: _Key, ops: Mapping[fx.Node, GridOp], places: Mapping[fx.Node, Place]
    ) -> None:
        self.regions, self.graph, self.key, self.ops, self.places = regions, regions.graph, key, ops, places
        self.images: dict[fx.Node, tuple[fx.Node, fx.Node | None]] = {}

    def run(self, demands: list[fx.Node]) -> None:
        run_on_grid = [node for node, where in self.places.items() if where.is_run_on_grid]
        imaged = {*run_on_grid, *(each for node in run_on_grid for each in self.ops[node].inputs)}
        moved = [each for each in demands if _value(each) in imaged]
        for cast in moved:
            q, scale = self._image(_value(cast), dict(cast.kwargs))
            self._put_in_place_of(cast, q, scale)
        for node in run_on_grid:
            if self.places[node] is Place.LOW:
                self._stand_in(node)
        for node in reversed(run_on_grid):
            if not node.users:
                self.graph.erase_node(node)

    def _image(self, node: fx.Node, attributes: dict[str, Any]) -> tuple[fx.Node, fx.Node | None]:
        """The grid values of a node and their scale."""
        if node in self.images:
            return self.images[node]
        if self.places[node].is_run_on_grid:
            op = self.ops[node]
            sources = {each: self._image(each, attributes) for each in op.inputs}
            scale = sources[op.inputs[0]][1]
            with self.graph.inserting_before(_behind(node)):
                q = op.replay(self.graph, {each: grid for each, (grid, _) in sources.items()})
                scale = None if scale is None else scale_behind(self.graph, op, scale, self.key.spec)
        else:
            with self.graph.inserting_before(_behind(node)):
                scale = self._scale(node) if self.key.scaled is not None else None
                q = self.graph.call_function(QUANTIZE, (node, scale, None), attributes)
        meta, dtype = node.meta[META], storage_dtype(self.key.spec.format)
        q.meta[META] = meta._replace(dtype=dtype, requires_grad=False)
        self.images[node] = q, scale
        return q, scale

    def _scale(self, source: fx.Node) -> fx.Node:
        """The scale of what is asked for, from the tensor that is cast: of the largest element of each group, after a
        relu if one lies between. One relu is as good as several, and what lies between else moves no magnitude.
        """
        cut, node, largest = None, self.key.scaled, source
        assert node is not None
        while node is not source and node in self.ops:  # else the source is a view of what the scale is of
            cut = self.ops[node] if self.ops[node].kind == "cut" else cut
            node = self.ops[node].inputs[0]
        cut = cut if node is source else None
        if cut is not None:
            rank = len(shape_of(source))
            granularity = self.key.spec.scale.granularity if self.key.spec.scale else "tensor"
            groups = {"row": (-1, True), "column": (tuple(range(rank - 1)), True)}.get(granularity, ())
            largest = self.graph.call_function(torch.amax, (source, *groups))
            largest = replace(cut, inputs=(source,)).replay(self.graph, {source: largest})
        return self.graph.call_function(SCALE, (largest,), {"spec": str(self.key.spec)})

    def _put_in_place_of(self, cast: fx.Node, q: fx.Node, scale: fx.Node | None) -> None:
        old = cast.args[1]
        cast.replace_all_uses_with(q)
        self.graph.erase_node(cast)
        if isinstance(old, fx.Node) and old is not scale:
            assert scale is not None
            old.replace_all_uses_with(scale)
            self.graph.erase_node(old)

    def _stand_in(self, node: fx.Node) -> None:
        """Whoever still takes the value as a carrier takes a stand-in: it is computed no more."""
        users = [user for user in node.users if user not in self.ops]
        if not users:
            return
        q, _ = self.images[node]
        with self.graph.inserting_before(_behind(q)):
            dtype = str(node.meta[META].dtype).removeprefix("torch.")
            made = self.graph.call_function(_STAND_IN, (q,), {"dtype": dtype})
        made.meta[META] = node.meta[META]
        for user in users:
            user.replace_input_with(node, made)


def _behind(node: fx.Node) -> fx.Node:
    """The first place behind a node where another may stand: inputs of a graph are at its top."""
    node = node.next
    while node.op == "placeholder":
        node = node.next
    return node


def _roles_of(value: fx.Node, gemm: fx.Node) -> set[str]:
    """The names of the operands that a GEMM takes a value for."""
    return {name for name, each in operands_of(gemm).items() if each is value}


def _has_later_casts_alone(gemm: fx.Node) -> bool:
    """Whether BWD or GRAD reads a cast that FWD does not."""
    operands = operands_of(gemm)
    read = [operands[name] for name in _FWD_CASTS]
    return any(operands[name] is not None and operands[name] not in read for name in _LATER_CASTS)


def _value(cast: fx.Node) -> fx.Node:
    """What is cast."""
    assert isinstance(cast.args[0], fx.Node)
    return cast.args[0]


def _is_summed(cast: fx.Node) -> bool:
    """Whether a cast is multiplied and summed, and nothing else: in sums of more than one product, which begin at +0, a
    product -0 is as good as +0. (A sum of one product may be that product.)
    """
    return all(map(_sums_several, cast.users))


def _sums_several(gemm: fx.Node) -> bool:
    """Whether a node is an lp.gemm of which FWD is known to add more than one product."""
    rhs = operands_of(gemm)["rhs"] if gemm.target is _GEMM else None
    if rhs is None or not elements(rhs):
        return False
    shape = shape_of(rhs)
    is_transposed = "output_padding" in str(gemm.kwargs.get("geometry", ""))
    summed = {"linear": shape[1:], "conv": shape[:1] if is_transposed else shape[1:]}
    return max(summed.get(str(gemm.kwargs["kind"]), shape[-2:-1]), default=1) > 1


def _switches_grad_mode(graph: fx.Graph) -> bool:
    return bool(graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled))


_SIZES = (torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel)
