"""lower-joint: the sites of a joint graph become casts, written as operations that a compiler fuses, and one opaque
product per role: lp::fwd, lp::bwd, lp::grad.

    %mm = mm(%x, %wT)          becomes    %q_x, %s_x = ... amax, div, round, clamp ...     of %x
                                          %q_w, %s_w = ...                                 of %w
                                          %y = lp.fwd(%q_x, %s_x, %q_w, %s_w, None, ...)

A cast is written once per tensor and spec: q, k and v share that of their input, FWD and GRAD share x, BWD and GRAD
share dy, wherever the specs are the same. Tensors are the same where their views of one tensor are. A role in which
nothing is cast stays what it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from passes.annotate import as_stored, refusal
from passes.ir.gemm_nodes import GemmNode
from passes.joint_products import JointSite, Product
from runtime.kernels.cast.grid import roomy_dtype
from runtime.kernels.registry import Choice, choose
from runtime.kernels.request import GemmRequest
from runtime.numerics.specs import ROLES, LayerSpec, QuantSpec, Role
from runtime.ops.layer import cast
from runtime.ops.plan import GemmPlan
from runtime.ops.products import has_free_scales, with_scales
from runtime.quantize.qtensor import CastKey, QTensor
from runtime.quantize.storage import storage_dtype

aten: Any = torch.ops.aten
lp: Any = torch.ops.lp
_NO_CLOCK = (0, 0, 0, 0)
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SAME = {*_VIEWS, aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default, aten.alias.default}


@dataclass
class Lowered:
    """What became of the sites of one graph."""

    choices: dict[str, dict[Role, Choice]] = field(default_factory=dict)
    """The backend of every role that the graph holds, by site."""
    specs: dict[str, LayerSpec] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    num_casts: int = 0
    """Casts that the graph holds."""
    num_cast_uses: int = 0
    """Operands that read them: what it would hold without sharing."""


def lower_joint(
    graph: fx.Graph,
    sites: Sequence[JointSite],
    specs: Mapping[str, LayerSpec],
    *,
    device: str,
    decompositions: Mapping[Any, Callable[..., Any]] | None,
    overflow_key: int = -1,
) -> Lowered:
    """Rewrite the sites of `specs` in place. decompositions: those of the compiler that casts are written for, or None
    where the graph runs op by op: then a scale and a cast are one op each, and a product multiplies by its scales
    itself. overflow_key: of the RunState that watches gradients; -1 for none.
    """
    done = Lowered()
    casts = _Casts(graph, decompositions, overflow_key, done)
    for site in sites:
        spec = specs.get(site.name)
        if spec is None:
            continue
        spec = as_stored(site.gemm, spec)
        reason = _refusal(site, spec, device)
        if reason is not None:
            done.refusals[site.name] = reason
            continue
        assert isinstance(site.gemm, GemmNode)
        kind = site.gemm.kind
        choices = {role: choose(GemmRequest(kind, role, spec.role(role), device)) for role in ROLES}
        methods = ",".join(choices[role].method for role in ROLES)
        plan = GemmPlan.parse(kind, str(spec), methods, 0, site.gemm.geometry)
        held = _rewrite(casts, site, site.gemm, plan)
        done.specs[site.name] = spec
        done.choices.setdefault(site.name, {}).update({role: choices[role] for role in held})
    graph.eliminate_dead_code()
    graph.lint()
    return done


def _refusal(site: JointSite, spec: LayerSpec, device: str) -> str | None:
    if spec.is_stochastic:
        return "the joint front end has no clock for stochastic rounding; torch.compile(lpcompile(model, policy)) has"
    if any(each.quantizer for each in (spec.fwd.lhs, spec.fwd.rhs)):
        return "the joint front end learns no scales; torch.compile(lpcompile(model, policy)) does"
    if site.stray and not spec.is_identity:  # what is not cast need not be told apart
        return f"%{site.stray[0].name} of its backward reads neither of its operands, or both"
    return refusal(site.gemm, spec, device)


def _rewrite(casts: "_Casts", site: JointSite, gemm: GemmNode, plan: GemmPlan) -> list[Role]:
    """Rewrite what the graph holds of a site; the roles that it holds."""
    spec = plan.spec
    held: list[Role] = ["fwd"]  # nodes that are replaced stay until the end, as readers of their operands
    if not plan.kernel("fwd").is_own_op:
        x = casts.of(gemm.lhs, spec.fwd.lhs)
        w = casts.of(gemm.rhs, spec.fwd.rhs)
        site.fwd.replace_all_uses_with(_multiply(casts, site.fwd, "fwd", plan, x, w, gemm.bias))
    for role, product in (("bwd", site.bwd), ("grad", site.grad)):
        if product is None and site.stray:
            held.append(role)  # type: ignore[arg-type]
        if product is not None:
            held.append(role)  # type: ignore[arg-type]
            if not plan.kernel(role).is_own_op:  # type: ignore[arg-type]
                _rewrite_product(casts, gemm, plan, role, product)  # type: ignore[arg-type]
    if site.conv_backward is not None:
        held += _rewrite_conv_backward(casts, site.conv_backward, gemm, plan)
    return held


def _rewrite_product(casts: "_Casts", gemm: GemmNode, plan: GemmPlan, role: Role, product: Product) -> None:
    graph, node, numbers = casts.graph, product.node, plan.spec.role(role)
    dy = product.dy
    if product.is_dy_transposed:
        dy = _transpose(graph, node, dy)
    other, like = (gemm.rhs, gemm.lhs) if role == "bwd" else (gemm.lhs, gemm.rhs)
    a, b = casts.of(dy, numbers.lhs, is_gradient=True), casts.of(other, numbers.rhs)
    new = _multiply(casts, node, role, plan, a, b, _shape(graph, node, like))
    node.replace_all_uses_with(_transpose(graph, node, new) if product.is_transposed else new)


def _rewrite_conv_backward(casts: "_Casts", node: fx.Node, gemm: GemmNode, plan: GemmPlan) -> list[Role]:
    """dx, dw and db of one convolution_backward, each where it is wanted; what is not cast stays with the node."""
    graph, dy, mask = casts.graph, node.args[0], list(node.args[-1])  # type: ignore[arg-type]
    assert isinstance(dy, fx.Node)
    held: list[Role] = [role for role, is_wanted in zip(("bwd", "grad"), mask) if is_wanted]  # type: ignore[misc]
    made: dict[int, fx.Node] = {}
    for index, role in enumerate(("bwd", "grad")):
        if not mask[index] or plan.kernel(role).is_own_op:  # type: ignore[arg-type]
            continue
        numbers = plan.spec.role(role)  # type: ignore[arg-type]
        other, like = (gemm.rhs, gemm.lhs) if role == "bwd" else (gemm.lhs, gemm.rhs)
        a, b = casts.of(dy, numbers.lhs, is_gradient=True), casts.of(other, numbers.rhs)
        made[index] = _multiply(casts, node, role, plan, a, b, _shape(graph, node, like))  # type: ignore[arg-type]
    if mask[2] and 1 in made:
        num_dims = dy.meta["val"].dim()
        with graph.inserting_before(node):
            made[2] = graph.call_function(aten.sum.dim_IntList, (dy, [0, *range(2, num_dims)]))
        made[2].meta["val"] = dy.meta["val"].sum([0, *range(2, num_dims)])
    for user in list(node.users):
        if user.target is getitem and user.args[1] in made:
            user.replace_all_uses_with(made[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    node.args = (*node.args[:-1], [is_wanted and index not in made for index, is_wanted in enumerate(mask)])
    return held


def _multiply(
    casts: "_Casts", at: fx.Node, role: Role, plan: GemmPlan,
    a: tuple[fx.Node, fx.Node | None], b: tuple[fx.Node, fx.Node | None], rest: Any,
) -> fx.Node:  # fmt: skip
    """`gemms.multiply_traced` before `at`: the opaque product, then its scales where they can stand outside."""
    op, numbers = {"fwd": lp.fwd, "bwd": lp.bwd, "grad": lp.grad}[role].default, plan.spec.role(role)
    value = at.meta["val"]
    dtype = value.dtype if isinstance(value, Tensor) else value[{"bwd": 0, "grad": 1}[role]].dtype
    is_free = casts.is_decomposed and has_free_scales(plan, role, _operand(a, numbers.lhs), _operand(b, numbers.rhs))
    bias = rest if role == "fwd" else None
    operands: tuple[Any, ...] = (*a, *b, rest)
    if is_free:
        operands = (a[0], None, b[0], None, None if role == "fwd" else rest)
    args = (*operands, *plan.attributes, _NO_CLOCK, torch.float32 if is_free else dtype)
    with casts.graph.inserting_before(at):
        node = casts.graph.call_function(op, args)
    node.meta["val"] = op(*fx.map_arg(args, lambda each: each.meta["val"]))
    _describe(node, at)
    if not is_free:
        return node
    inputs = {"y": node, "a_scale": a[1], "b_scale": b[1], "bias": bias}

    def scale(**tensors: Tensor) -> tuple[Tensor, ...]:
        optional = (tensors.get(name) for name in ("a_scale", "b_scale", "bias"))
        return (with_scales(role, plan, tensors["y"], *optional).to(dtype),)

    return casts.splice(at, scale, {name: each for name, each in inputs.items() if each is not None})[0]


def _operand(pair: tuple[fx.Node, fx.Node | None], spec: QuantSpec) -> QTensor:
    grid, scale = pair
    return QTensor(grid.meta["val"], None if scale is None else scale.meta["val"], spec)


def _describe(node: fx.Node, like: fx.Node) -> None:
    """Whose product it is, and whether of the backward: what a partitioner and a reader of the graph look at."""
    for key in ("custom", "seq_nr", "partitioner_tag", "autograd_backward", "nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]


def _transpose(graph: fx.Graph, at: fx.Node, node: fx.Node) -> fx.Node:
    num_dims = node.meta["val"].dim()
    dims = [*range(num_dims - 2), num_dims - 1, num_dims - 2]
    with graph.inserting_before(at):
        new = graph.call_function(aten.permute.default, (node, dims))
    new.meta["val"] = node.meta["val"].permute(dims)
    return new


def _shape(graph: fx.Graph, at: fx.Node, like: fx.Node) -> list[Any]:
    """The sizes of a node; one that is a symbol is read from the node itself."""
    sizes: list[Any] = []
    for dim, size in enumerate(like.meta["val"].shape):
        if isinstance(size, torch.SymInt):
            with graph.inserting_before(at):
                read = graph.call_function(aten.sym_size.int, (like, dim))
            read.meta["val"] = size
            sizes.append(read)
        else:
            sizes.append(size)
    return sizes


class _Casts:
    """The casts of one graph, each written once."""

    def __init__(
        self,
        graph: fx.Graph,
        decompositions: Mapping[Any, Callable[..., Any]] | None,
        overflow_key: int,
        done: Lowered,
    ) -> None:
        self.graph = graph
        self.is_decomposed = decompositions is not None
        self._decompositions = dict(decompositions or {})
        self._overflow_key = overflow_key
        self._done = done
        self._made: dict[Any, tuple[fx.Node, fx.Node | None]] = {}
        self._representatives: dict[Any, fx.Node] = {}

    def of(self, x: fx.Node, spec: QuantSpec, is_gradient: bool = False) -> tuple[fx.Node, fx.Node | None]:
        """Grid and scale of x, written where x is if no earlier site has them: there every reader finds them."""
        if spec.is_identity:
            return x, None
        key = (self._representative(x), CastKey(spec))
        self._done.num_cast_uses += 1
        if key not in self._made:
            self._done.num_casts += 1
            write = self._write_watched if is_gradient and self._overflow_key >= 0 else self._write
            self._made[key] = write(x, spec, self._after(x))
        return self._made[key]

    def _after(self, x: fx.Node) -> fx.Node:
        """Where a cast of x is written: next to x; of an input next to its first reader, since a partitioner may take
        the place of a node for its part of the graph, forward or backward.
        """
        if x.op != "placeholder":
            return x.next
        return next(node for node in self.graph.nodes if node in x.users)

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

    def _write(self, x: fx.Node, spec: QuantSpec, at: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        if not self.is_decomposed:
            scale = self._call(at, lp.compute_scale.default, x, spec.text) if spec.has_scale else None
            dtype = roomy_dtype(spec, storage_dtype(spec.format))
            return self._call(at, lp.to_grid.default, x, scale, spec.text, dtype, *_NO_CLOCK), scale

        def run(x: Tensor) -> tuple[Tensor, ...]:
            operand = cast(x, spec, None, 0, 0)
            return (operand.grid,) if operand.scale is None else (operand.grid, operand.scale)

        outputs = self.splice(at, run, {"x": x})
        return outputs[0], outputs[1] if len(outputs) > 1 else None

    def _call(self, at: fx.Node, op: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(at):
            node = self.graph.call_function(op, args)
        node.meta["val"] = op(*fx.map_arg(args, lambda each: each.meta["val"]))
        return node

    def _write_watched(self, x: fx.Node, spec: QuantSpec, at: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        args = (x, str(spec), _NO_CLOCK, self._overflow_key, 0, 0)
        values = lp.cast_gradient.default(*fx.map_arg(args, lambda each: each.meta["val"]))
        with self.graph.inserting_before(at):
            both = self.graph.call_function(lp.cast_gradient.default, args)
            parts = [self.graph.call_function(getitem, (both, index)) for index in range(2)]
        both.meta["val"] = values
        for part, value in zip(parts, values):
            part.meta["val"] = value
        return parts[0], parts[1] if spec.has_scale else None

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
