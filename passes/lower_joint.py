"""lower-joint: the products of a joint graph become casts, shared, and one opaque product a role.

    %y = lp.site_fwd(%x, %w, %b)      becomes    %q_x, %s_x = lp.cast(%x)      %q_w, %s_w = lp.cast(%w)
                                                 %y = lp.fwd(%q_x, %s_x, %q_w, %s_w, %b)

FWD, BWD and GRAD of a site are nodes of one graph, so that a cast is written once for all that read it: q, k and v cast
one x; where the specs are equal, FWD and GRAD share x, FWD and BWD the weight, BWD and GRAD dy. What is cast is told by
the tensor modulo views and by the key of the cast; casts that draw random bits are a role's own.

Run op by op a cast is one kernel. For Inductor it is written as operations that fuse with what made the tensor, and
scales stand outside of the product where they can, to fuse with what follows. A role that casts nothing stays as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from runtime.kernels.cast.packing import packing_for
from runtime.numerics.specs import QuantSpec, Role
from runtime.ops.layer import cast
from runtime.ops.plan import GemmPlan
from runtime.ops.products import has_free_scales, with_scales
from runtime.ops.site_products import Operand, cast_clock, operands_of, sums_clock
from runtime.quantize.qtensor import QTensor

aten: Any = torch.ops.aten
lp: Any = torch.ops.lp
SITES: dict[Any, Role] = {lp.site_fwd.default: "fwd", lp.site_bwd.default: "bwd", lp.site_grad.default: "grad"}
SITE = "lp_site"
"""Where the meta of a node that multiplies says its site and role."""
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SAME = {*_VIEWS, aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default, aten.alias.default}
_Pair = tuple[fx.Node, fx.Node | None]


@dataclass
class Lowered:
    """What became of the products of one graph."""

    roles: dict[str, set[Role]] = field(default_factory=dict)
    """Which roles of each site the graph holds."""
    num_products: int = 0
    num_casts: int = 0
    """Casts that the graph holds."""
    num_cast_uses: int = 0
    """Operands that read them: what it would hold without sharing."""


def lower_joint(graph: fx.Graph, decompositions: Mapping[Any, Callable[..., Any]] | None) -> Lowered:
    """Rewrite every product of a site in place. decompositions: those of the compiler that casts are written for, or
    None where the graph runs op by op.
    """
    done = Lowered()
    casts = _Casts(graph, decompositions, done)
    for node in [node for node in graph.nodes if node.op == "call_function" and node.target in SITES]:
        _lower(casts, node, SITES[node.target])
    graph.eliminate_dead_code()
    graph.lint()
    return done


def _lower(casts: "_Casts", node: fx.Node, role: Role) -> None:
    lhs, rhs, rest, text, is_weight, name, clock, key, looks, dtype = node.args
    plan = GemmPlan.read(str(text))
    casts.done.roles.setdefault(str(name), set()).add(role)
    casts.done.num_products += 1
    node.meta[SITE] = (name, role)
    if plan.kernel(role).is_own_op:
        return
    first, second = operands_of(plan, role, bool(is_weight))
    where = _Site(plan.site, clock, key, bool(looks))
    a = casts.of(lhs, first, where, node)  # type: ignore[arg-type]
    if plan.spec.keep == "codes" and role == "bwd" and is_weight:
        b = casts.again(rhs, second, where, node)  # type: ignore[arg-type]
    else:
        b = casts.of(rhs, second, where, node)  # type: ignore[arg-type]
        if plan.spec.keep == "codes" and role != "fwd":
            b = casts.kept(b, second.spec, node), b[1]
    new = _multiply(casts, node, role, plan, a, b, rest, sums_clock(plan, role, clock), dtype)  # type: ignore[arg-type]
    node.replace_all_uses_with(new)
    casts.graph.erase_node(node)


def _multiply(
    casts: "_Casts", at: fx.Node, role: Role, plan: GemmPlan, a: _Pair, b: _Pair, rest: Any, clock: Any, dtype: Any
) -> fx.Node:
    """`products.multiply_traced` before `at`: the opaque product, then its scales where they can stand outside."""
    op, numbers = {"fwd": lp.fwd, "bwd": lp.bwd, "grad": lp.grad}[role].default, plan.spec.role(role)
    is_free = casts.is_decomposed and has_free_scales(plan, role, _operand(a, numbers.lhs), _operand(b, numbers.rhs))
    bias = rest if role == "fwd" else None
    operands: tuple[Any, ...] = (*a, *b, rest)
    if is_free:
        operands = (a[0], None, b[0], None, None if role == "fwd" else rest)
    args = (*operands, plan.text, clock, torch.float32 if is_free else dtype)
    node = casts.call(at, op, *args)
    for name in (SITE, "custom", "seq_nr", "partitioner_tag", "autograd_backward", "nn_module_stack", "stack_trace"):
        if name in at.meta:  # what a partitioner and a reader of the graph look at
            node.meta[name] = at.meta[name]
    if not is_free:
        return node
    inputs = {"y": node, "a_scale": a[1], "b_scale": b[1], "bias": bias}

    def scale(**tensors: Tensor) -> tuple[Tensor, ...]:
        optional = (tensors.get(name) for name in ("a_scale", "b_scale", "bias"))
        return (with_scales(role, plan, tensors["y"], *optional).to(dtype),)

    return casts.splice(at, scale, {name: each for name, each in inputs.items() if each is not None})[0]


def _operand(pair: _Pair, spec: QuantSpec) -> QTensor:
    grid, scale = pair
    return QTensor(grid.meta["val"], None if scale is None else scale.meta["val"], spec)


@dataclass(frozen=True)
class _Site:
    """What the casts of a site read beside its tensors."""

    number: int
    clock: Any
    key: Any
    looks: bool
    """Whether what observes its operands is told of them."""


class _Casts:
    """The casts of one graph, each written once."""

    def __init__(self, graph: fx.Graph, decompositions: Mapping[Any, Callable[..., Any]] | None, done: Lowered) -> None:
        self.graph = graph
        self.done = done
        self.is_decomposed = decompositions is not None
        self._decompositions = dict(decompositions or {})
        self._made: dict[Any, _Pair] = {}
        self._representatives: dict[Any, fx.Node] = {}
        self._buffers: dict[fx.Node, fx.Node] = {}

    def of(self, x: fx.Node, operand: Operand, site: _Site, reader: fx.Node) -> _Pair:
        """Grid and scale of x, written where x is if no earlier site has them: there every reader finds them."""
        if operand.spec.is_identity:
            return x, None
        drawn = str(site.clock[0]) if operand.spec.is_stochastic else ""  # of which call of its site
        key = (self._representative(x), operand.key(site.number), drawn)
        self.done.num_cast_uses += 1
        if key not in self._made:
            self.done.num_casts += 1
            self._made[key] = self._write(x, operand, site, reader)
        return self._made[key]

    def again(self, x: fx.Node, operand: Operand, site: _Site, reader: fx.Node) -> _Pair:
        """A cast of a weight in backward, which then keeps nothing but the weight. A compiler merges equal nodes, and
        is told to compute the one that is left twice.
        """
        if operand.spec.is_identity or operand.spec.is_stochastic:
            return self.of(x, operand, site, reader)
        if not self.is_decomposed:
            self.done.num_cast_uses += 1
            self.done.num_casts += 1
            return self._write(x, operand, site, reader, is_late=True)
        grid, scale = self.of(x, operand, site, reader)
        steps = [grid]  # the whole cast: a step of it, kept, would be as large
        while steps:
            step = steps.pop()
            if step is x or step.op != "call_function" or step.meta.get("recompute"):
                continue
            step.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            steps += step.all_input_nodes
        return grid, scale

    def kept(self, pair: _Pair, spec: QuantSpec, reader: fx.Node) -> fx.Node:
        """What backward reads of a cast that forward made: its codes, which a partitioner keeps since they are the
        smallest that the values can be made of, as values again.
        """
        grid, _ = pair
        value = grid.meta["val"]
        if spec.is_stochastic or packing_for(spec, value.dtype) is None:
            return grid
        if grid not in self._buffers:
            self._buffers[grid] = self.call(grid.next, lp.pack.default, grid, spec.text)
            self._buffers[grid].meta["recompute"] = CheckpointPolicy.MUST_SAVE
        shape = [size if isinstance(size, int) else self._size(grid, dim) for dim, size in enumerate(value.shape)]
        return self.call(reader, lp.unpack.default, self._buffers[grid], shape, spec.text, value.dtype)

    def _size(self, x: fx.Node, dim: int) -> fx.Node:
        """A size of x that is a symbol, as a node beside x."""
        return self.call(x.next, aten.sym_size.int, x, dim)

    def _representative(self, x: fx.Node) -> Any:
        """The same value for nodes that are the same view of the same tensor."""
        if x.op != "call_function" or x.target not in _SAME:
            return x
        base: Any = x.args[0]
        rest: Any = x.args[1:]
        if x.target in _VIEWS:  # a view of a view is a view
            while base.op == "call_function" and base.target in _VIEWS:
                base = base.args[0]
            rest = tuple(x.meta["val"].shape)
        key = (x.target in _VIEWS or x.target, self._representative(base), str(rest))
        return self._representatives.setdefault(key, x)

    def _write(self, x: fx.Node, operand: Operand, site: _Site, reader: fx.Node, is_late: bool = False) -> _Pair:
        spec, clock = operand.spec, cast_clock(operand.spec, site.clock)
        at = reader if spec.is_stochastic or is_late else self._after(x)
        is_watched = operand.is_gradient and site.key >= 0
        how = (str(spec), clock, site.key, site.number, operand.slot, operand.owner)
        if spec.observes and not is_watched:
            both = self.call(at, lp.cast_observed.default, x, *how, site.looks)
        elif self.is_decomposed and not is_watched and not spec.is_stochastic:
            outputs = self.splice(at, lambda x: _parts(cast(x, spec, None, 0, 0)), {"x": x})
            return outputs[0], outputs[1] if len(outputs) > 1 else None
        elif is_watched:
            both = self.call(at, lp.cast_gradient.default, x, *how)
        else:
            both = self.call(at, lp.cast.default, x, str(spec), clock, site.number, operand.slot)
        grid = self.call(at, getitem, both, 0)
        return grid, self.call(at, getitem, both, 1) if spec.has_scale else None

    def _after(self, x: fx.Node) -> fx.Node:
        """Where a cast of x that may be shared is written: next to x; of the graph's own inputs next to the first
        reader, since a partitioner may take the place of a node for its part of the graph, forward or backward.
        """
        if x.op != "placeholder":
            return x.next
        return next(node for node in self.graph.nodes if node in x.users)

    def call(self, at: fx.Node, op: Any, *args: Any) -> fx.Node:
        """A call of `op` before `at`."""
        with self.graph.inserting_before(at):
            node = self.graph.call_function(op, args)
        node.meta["val"] = op(*fx.map_arg(args, lambda each: each.meta["val"]))
        return node

    def splice(
        self, at: fx.Node, run: Callable[..., tuple[Tensor, ...]], inputs: Mapping[str, fx.Node]
    ) -> list[fx.Node]:
        """Write the operations of `run(**inputs)` before `at`; its results."""

        def by_position(*values: Tensor) -> tuple[Tensor, ...]:
            return run(**dict(zip(inputs, values)))

        values = [node.meta["val"] for node in inputs.values()]
        traced = make_fx(by_position, decomposition_table=self._decompositions, tracing_mode="real")(*values)
        given, copies = iter(inputs.values()), dict[fx.Node, fx.Node]()
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                return [copies[each] for each in node.args[0]]
            else:
                assert node.op == "call_function", node.format_node()
                with self.graph.inserting_before(at):
                    copies[node] = self.graph.node_copy(node, copies.__getitem__)
        raise AssertionError("a graph has an output")


def _parts(operand: QTensor) -> tuple[Tensor, ...]:
    return (operand.grid,) if operand.scale is None else (operand.grid, operand.scale)
