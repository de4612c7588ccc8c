"""Site products: the three GEMMs of a site as a graph has them before passes/lower_joint.py lowers them.

    lp::site_fwd     y = x . w + bias        operands as they are, the site and all that its policy says as attributes
    lp::site_bwd     dx = dy . w             what autograd makes of it, a node each
    lp::site_grad    dw = dy . x

Under the joint front end torch.compile traces these: FWD, BWD and GRAD are nodes of one graph, with no cast yet.
Each is also what it says: run as it is, it makes its casts and its product with the bits of eager code.

    lp::cast         grid and scale of x under a spec, as one op; scale 1 where the spec has none

`clock` is (seed, rank, step, micro-batch) where something is stochastic, an input of the graph; `key` is that of the
RunState which watches gradients, or observes operands, or -1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.compile_marks import constant_result
from runtime.kernels.torch_ops import declare
from runtime.numerics.specs import LayerSpec, QuantSpec, Role
from runtime.ops.layer import DY_BWD, DY_GRAD, WEIGHT_BWD, owner_in
from runtime.ops.plan import GemmPlan
from runtime.ops.products import laid_out, layout_of
from runtime.ops.traced import cast_result, cast_shape
from runtime.quantize.qtensor import CastKey
from runtime.state import RunState
from runtime.streams import NO_CLOCK

lp: Any = torch.ops.lp


class Operand(NamedTuple):
    """A cast that a role reads: of which operand, by its name, under which spec, with which random bits."""

    spec: QuantSpec
    slot: int
    owner: str
    is_gradient: bool = False

    def key(self, site: int) -> tuple[Any, ...]:
        """What tells casts of one tensor apart: those that draw, or whose scale has a state, are a site's own."""
        drawn = (site, self.slot) if self.spec.is_stochastic else ()
        return CastKey(self.spec, self.owner if self.spec.observes else ""), self.is_gradient, drawn


def operands_of(plan: GemmPlan, role: Role, is_weight: bool) -> tuple[Operand, Operand]:
    """The casts of a role, in the order of its operands."""
    spec, left, right = plan.spec, owner_in(plan, role, "lhs"), owner_in(plan, role, "rhs")
    if role == "fwd":
        return Operand(spec.fwd.lhs, 0, left), Operand(spec.fwd.rhs, 1, right)
    if role == "bwd":
        slot = WEIGHT_BWD if is_weight else 1 if spec.bwd.rhs == spec.fwd.rhs else 2
        return Operand(spec.bwd.lhs, DY_BWD, left, is_gradient=True), Operand(spec.bwd.rhs, slot, right)
    slot = 0 if spec.grad.rhs == spec.fwd.lhs else 3
    return Operand(spec.grad.lhs, DY_GRAD, left, is_gradient=True), Operand(spec.grad.rhs, slot, right)


def site_product(
    lhs: Tensor, rhs: Tensor, bias: Tensor | None, state: RunState, dtype: torch.dtype,
    plan: str, clock: Sequence[int], is_weight: bool, name: str, looks: bool,
) -> Tensor:  # fmt: skip
    """FWD of a site in code that is traced. `clock` as `find_clock` gives it; `name` is the site's, for who reads the
    graph; looks: whether what observes its operands is told of them.
    """
    key = int(state.key_text) if state.watch_overflow or _observes(plan) else -1
    y: Tensor = lp.site_fwd(lhs, rhs, bias, plan, is_weight, name, clock, key, looks, dtype)
    return y


@constant_result
def _observes(plan: str) -> bool:
    return GemmPlan.read(plan).spec.observes


@constant_result
def is_lowered_late(spec: str) -> bool:
    """Whether a graph may hold the site as nodes without casts. The identity is torch's own op, with torch's own
    backward, and a quantizer with state that learns has a gradient of its own.
    """
    layer = LayerSpec.parse(spec)
    learns = [each.quantizer is not None and each.quantizer.learns for each in (layer.fwd.lhs, layer.fwd.rhs)]
    return not layer.is_identity and not any(learns)


def _fwd(
    lhs: Tensor, rhs: Tensor, bias: Tensor | None, plan: str, is_weight: bool, name: str, clock: Sequence[int],
    key: int, looks: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _run("fwd", GemmPlan.read(plan), lhs, rhs, bias, is_weight, clock, key, looks, dtype)


def _gradient_of(role: Role) -> Any:
    def run(
        dy: Tensor, other: Tensor, shape: Sequence[int], plan: str, is_weight: bool, name: str, clock: Sequence[int],
        key: int, looks: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return _run(role, GemmPlan.read(plan), dy, other, shape, is_weight, clock, key, looks, dtype)

    return run


def _run(
    role: Role, plan: GemmPlan, a: Tensor, b: Tensor, rest: Any, is_weight: bool, clock: Sequence[int], key: int,
    looks: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if plan.kernel(role).is_own_op:
        if role == "fwd":
            own = plan.contraction.native(a, b, rest)
        else:
            multiply = plan.contraction.bwd if role == "bwd" else plan.contraction.grad
            own = multiply(a, b, torch.Size(rest), torch.matmul)
        return laid_out(own.to(dtype), layout_of(plan, a, b))
    casts: list[Tensor | None] = []
    for x, operand in zip((a, b), operands_of(plan, role, is_weight)):
        casts += _cast_operand(x, operand, clock, key, plan.site, looks)
    y: Tensor = getattr(lp, role)(*casts, rest, plan.text, sums_clock(plan, role, clock), dtype)
    return y


def _cast_operand(
    x: Tensor, operand: Operand, clock: Sequence[int], key: int, site: int, looks: bool
) -> tuple[Tensor, Tensor | None]:
    spec = operand.spec
    if spec.is_identity:
        return x, None
    drawn = cast_clock(spec, clock)
    if operand.is_gradient and key >= 0:
        grid, scale = lp.cast_gradient(x, str(spec), drawn, key, site, operand.slot, operand.owner)
    elif spec.observes:
        grid, scale = lp.cast_observed(x, str(spec), drawn, key, site, operand.slot, operand.owner, looks)
    else:
        grid, scale = lp.cast(x, str(spec), drawn, site, operand.slot)
    return grid, scale if spec.has_scale else None


def cast_clock(spec: QuantSpec, clock: Sequence[int]) -> Sequence[int]:
    """What a cast reads of the clock of its site."""
    return clock if spec.is_stochastic else NO_CLOCK


def sums_clock(plan: GemmPlan, role: Role, clock: Sequence[int]) -> Sequence[int]:
    """What the sums of a role read of the clock of their site."""
    return clock if role in plan.stochastic_sums else NO_CLOCK


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    lhs, rhs, bias, *ctx.attributes = inputs
    ctx.save_for_backward(lhs, rhs)
    ctx.bias = None if bias is None else (bias.shape, bias.dtype)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    lhs, rhs = ctx.saved_tensors
    plan, *attributes, _ = ctx.attributes
    needs_lhs, needs_rhs, needs_bias = ctx.needs_input_grad[:3]
    dx = lp.site_bwd(dy, rhs, lhs.shape, plan, *attributes, lhs.dtype) if needs_lhs else None
    dw = lp.site_grad(dy, lhs, rhs.shape, plan, *attributes, rhs.dtype) if needs_rhs else None
    db = None
    if needs_bias:
        shape, dtype = ctx.bias
        db = GemmPlan.read(plan).contraction.bias_grad(dy).sum_to_size(shape).to(dtype)
    return dx, dw, db, *(None,) * len(ctx.attributes)


def _shape_of(role: Role) -> Any:
    def fake(a: Tensor, b: Tensor, rest: Any, plan: str, is_weight: bool, name: str, clock: Any, *more: Any) -> Tensor:
        result: Tensor = getattr(lp, role)(a, None, b, None, rest, plan, clock, more[-1])
        return result

    return fake


def _cast(x: Tensor, spec: str, clock: Sequence[int], site: int, slot: int) -> tuple[Tensor, Tensor]:
    return cast_result(x, spec, clock, site, slot)


_REST = "str plan, bool is_weight, str name, SymInt[] clock, int key, bool looks, ScalarType dtype"
declare(
    "cast(Tensor x, str spec, SymInt[] clock, int site, int slot) -> (Tensor, Tensor)", _cast,
    fake=lambda x, spec, clock, site, slot: cast_shape(x, spec),
)  # fmt: skip
declare(
    f"site_fwd(Tensor lhs, Tensor rhs, Tensor? bias, {_REST}) -> Tensor",
    _fwd, fake=_shape_of("fwd"), setup_context=_setup, backward=_backward,
)  # fmt: skip
_ROLES: tuple[Role, Role] = ("bwd", "grad")
for _role in _ROLES:
    _schema = f"site_{_role}(Tensor dy, Tensor other, SymInt[] shape, {_REST}) -> Tensor"
    declare(_schema, _gradient_of(_role), fake=_shape_of(_role))
