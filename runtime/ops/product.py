"""Product: one GEMM site under one phase of a policy, planned once and run with whatever operands come.

    y = product(x, w, b)        casts of x and w, found or made, then FWD; BWD and GRAD when gradients flow

Nothing of a call is kept: shapes, dtypes and a convolution's geometry are read as it runs. Casts of activations are
shared through runtime/quantize/cast_memo.py, casts of weights are kept by runtime/quantize/kept_casts.py. Compiled code
gets the same product as lp ops.
"""

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.compile_marks import constant_result
from runtime.compiled_reads import count_in_trace
from runtime.errors import LoweringError, LoweringWarning
from runtime.kernels.cast.scales import compute_scale
from runtime.numerics.free_axes import Side
from runtime.numerics.specs import LayerSpec, QuantSpec, Role
from runtime.ops import dialect
from runtime.ops.contractions import ConvGeometry
from runtime.ops.draws import draw_of
from runtime.ops.layer import (
    cast,
    check_transforms,
    check_whole,
    note_call,
    result_dtype,
    run_gemm,
    under_autocast,
)
from runtime.ops.observed import cast_forward
from runtime.ops.plan import GemmPlan, plan_text, print_geometry
from runtime.ops.products import multiply_unrecorded
from runtime.ops.site_products import is_lowered_late, site_product
from runtime.ops.small import small_layer
from runtime.ops.traced import cast_traced, find_clock
from runtime.quantize.cast_memo import MEMO
from runtime.quantize.kept_casts import Lifetime
from runtime.quantize.owners import operand_of, owner_of
from runtime.quantize.qtensor import CastKey, QTensor
from runtime.quantize.quantizer import to_grid
from runtime.state import RunState, find_state
from runtime.streams import SITE_BITS, Turn


@dataclass
class Product:
    """A site that runs. `kind` is a row of runtime.ops.plan.KINDS or conv; `spec` says the operands as they lie in
    memory, `kernels` how each role runs; `site` keys its random streams, and `site + g group_stride` those of group g.
    """

    name: str
    kind: str
    spec: LayerSpec
    kernels: tuple[str, str, str]
    site: int
    state: RunState
    lifetime: Lifetime = "step"
    group_stride: int = 1
    _plans: dict[tuple[ConvGeometry | None, int], GemmPlan] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.is_identity = self.spec.is_identity
        self.is_stochastic = self.spec.is_stochastic
        self.text = TracedProduct.write(self)
        self._owners = tuple(owner_of(self.name, operand_of(self.spec, *each)) for each in _SLOTS)
        self._small = small_layer(self.kind, self.spec, self.kernels)

    def __call__(
        self,
        lhs: Tensor,
        rhs: Tensor,
        bias: Tensor | None = None,
        *,
        geometry: ConvGeometry | None = None,
        is_weight: bool = False,
        group: int = 0,
    ) -> Tensor:
        """lhs . rhs + bias in the dtype of lhs, differentiable in all three. is_weight: rhs is a parameter, which is
        cast again in backward and not kept until then.
        """
        if torch.compiler.is_compiling():
            return TracedProduct(self.text, self.state)(
                lhs, rhs, bias, geometry=geometry, is_weight=is_weight, group=group * self.group_stride
            )
        if self.state.watcher is None:
            return self._run(lhs, rhs, bias, geometry, is_weight, group)
        y = self._run(lhs, rhs, bias, geometry, is_weight, group)
        self.state.watcher.see(self, y, lhs, rhs, geometry)
        return y

    def _run(
        self, lhs: Tensor, rhs: Tensor, bias: Tensor | None, geometry: ConvGeometry | None, is_weight: bool, group: int
    ) -> Tensor:
        """In eager code."""
        plan = self._plans.get((geometry, group)) or self._plan(geometry, group)
        if self._small is not None and group == 0 and geometry is None:
            y = self._small(lhs, rhs, bias, plan, self.state)
            if y is not None:
                return y
        if self.is_identity:
            note_call(self.state, plan, "fwd")
            return plan.contraction.native(*under_autocast(lhs, rhs, bias))
        check_transforms(False, lhs, rhs, bias)
        check_whole(self.name, lhs, rhs)
        spec, needs_grad = self.spec, torch.is_grad_enabled()
        turn = self.state.turn(plan.site) if self.is_stochastic else None
        x, w = lhs, rhs
        if not _learns(spec.fwd.lhs):
            fwd_lhs = self._activation(x, spec.fwd.lhs, turn, 0)
        else:
            lhs, fwd_lhs = self._learned(x, spec.fwd.lhs, "x", plan.site, 0, "", turn)
        if _learns(spec.fwd.rhs):
            rhs, fwd_rhs = self._learned(w, spec.fwd.rhs, "w", plan.site, 1, self.lifetime if is_weight else "", turn)
        elif is_weight:
            fwd_rhs = self._weight(w, plan, turn)
        else:
            fwd_rhs = self._activation(w, spec.fwd.rhs, turn, 1)
        bwd_rhs = grad_lhs = None
        if needs_grad and lhs.requires_grad and (not is_weight or _learns(spec.bwd.rhs)):
            same = spec.bwd.rhs == spec.fwd.rhs
            bwd_rhs = fwd_rhs if same else self._activation(w, spec.bwd.rhs, turn, 2)
        if needs_grad and rhs.requires_grad:
            same = spec.grad.rhs == spec.fwd.lhs
            grad_lhs = fwd_lhs if same else self._activation(x, spec.grad.rhs, turn, 3)
        if not needs_grad or not (lhs.requires_grad or rhs.requires_grad or (bias is not None and bias.requires_grad)):
            note_call(self.state, plan, "fwd")
            return multiply_unrecorded(plan, fwd_lhs, fwd_rhs, bias, result_dtype(lhs), turn)
        casts = {"fwd_lhs": fwd_lhs, "fwd_rhs": fwd_rhs, "bwd_rhs": bwd_rhs, "grad_lhs": grad_lhs}
        return run_gemm(lhs, rhs, bias, casts, self.state, plan, turn=turn)

    def count(self) -> None:
        """A call that torch's own function runs, as the identity says."""
        note_call(self.state, self._plans.get((None, 0)) or self._plan(None, 0), "fwd")

    def fall_through(self, reason: str) -> None:
        """A call that torch's own function runs although the policy says otherwise: told once a site, refused under
        strict.
        """
        if self.state.strict:
            raise LoweringError(
                f"{self.name} would run as in the uncompiled model: {reason}",
                where="strict",
                expected="every named GEMM to run as its policy says, in every call",
                hint="strict=False, or another rule for it",
            )
        if self.state.calls.fell_through(self.name, reason):
            warnings.warn(f"{self.name} ran as in the uncompiled model: {reason}", LoweringWarning, stacklevel=2)

    def _plan(self, geometry: ConvGeometry | None, group: int) -> GemmPlan:
        site = self.site + group * self.group_stride
        lifetime = self.lifetime if _is_worth_keeping(self.spec.bwd.rhs) else ""
        plan = GemmPlan(self.kind, self.spec, self.kernels, site, geometry, lifetime, self.name)
        self._plans[geometry, group] = plan
        return plan

    def _activation(self, x: Tensor, spec: QuantSpec, turn: Turn | None, slot: int) -> QTensor:
        if spec.observes:
            owner, draw = self._owners[slot], draw_of(spec, turn, self.site, slot)
            return cast_forward(x, self.state, owner, draw)
        if spec.is_identity or spec.is_stochastic:
            return cast(x, spec, turn, self.site, slot)
        is_brief = self.spec.keep == "codes"
        return MEMO.find_or_make(x, CastKey(spec), lambda: cast(x, spec, turn, self.site, slot), is_brief)

    def _learned(
        self, x: Tensor, spec: QuantSpec, operand: str, site: int, slot: int, lifetime: str, turn: Turn | None
    ) -> tuple[Tensor, QTensor]:
        """What carries the gradient of x and of the quantizer's state, and the cast."""
        state, owner, text = self.state, f"{self.name}.{operand}".removeprefix("."), str(spec)
        scale = dialect.learned_scale(x, state, spec=text, quantizer=owner)
        carrier = dialect.carrier(x, scale, state, spec=text, quantizer=owner)
        if spec.is_stochastic:
            return carrier, QTensor(to_grid(x, scale, spec, draw_of(spec, turn, site, slot)), scale, spec)
        keyed = {"site": site, "slot": slot, "lifetime": lifetime, "quantizer": owner}
        return carrier, QTensor(dialect.quantize(x, scale, state, spec=text, **keyed), scale, spec)  # type: ignore[arg-type]

    def _weight(self, w: Tensor, plan: GemmPlan, turn: Turn | None) -> QTensor:
        """FWD's cast of a weight, kept between uses where that is worth asking."""
        spec, state = self.spec.fwd.rhs, self.state
        kept = None
        if spec.observes:
            draw = draw_of(spec, turn, plan.site, 1)
            find = lambda key: state.constants.find(w, key, plan.site, 1, self.lifetime)  # noqa: E731
            return cast_forward(w, state, self._owners[1], draw, find)
        if _is_worth_keeping(spec):
            kept = state.constants.find(w, CastKey(spec), plan.site, 1, self.lifetime)
        if kept is None:
            return cast(w, spec, turn, plan.site, 1)
        scale = kept.scale_or(lambda: compute_scale(w.detach(), spec)) if spec.has_scale else None
        return QTensor(kept.grid_or(lambda: to_grid(w, scale, spec)), scale, spec)  # what is kept draws nothing


def _learns(spec: QuantSpec) -> bool:
    return spec.quantizer is not None and spec.quantizer.learns


def _is_worth_keeping(spec: QuantSpec) -> bool:
    return not spec.is_identity and not spec.is_stochastic and spec.transform is None


TRANSFORM = " hadamard"
"""What a spec with a transform has in its text, which compiled code reads."""


class TracedProduct:
    """A product as compiled code has it: lp ops, from a text that torch.compile takes for a constant."""

    def __init__(self, text: str, state: RunState) -> None:
        parts = text.split("|")
        self.kind, self.spec, self.kernels, self.site, self.name = *parts[:3], int(parts[3]), parts[4]
        self.casts = parts[5:]
        self.state = state

    @staticmethod
    def write(product: Product) -> str:
        """What __init__ reads: after the first five the casts of FWD's operands, of BWD's right and of GRAD's x, each
        with a mark: ! for no scale, ~ for one that is learned, ^ for one that is observed.
        """
        spec = product.spec
        casts = (spec.fwd.lhs, spec.fwd.rhs, spec.bwd.rhs, spec.grad.rhs)
        marked = [f"{each}{_mark(each)}" for each in casts]
        return "|".join((product.kind, str(spec), ",".join(product.kernels), str(product.site), product.name, *marked))

    def __call__(
        self,
        lhs: Tensor,
        rhs: Tensor,
        bias: Tensor | None = None,
        *,
        geometry: ConvGeometry | None = None,
        is_weight: bool = False,
        group: int = 0,
    ) -> Tensor:
        """As a Product; `group` is what is added to the number of the site."""
        site, of = self.site + group, self.casts
        _note_trace(self.state.key_text)
        if _draws(self.spec):
            site = site + (_count_call(self.state.key_text, site) << SITE_BITS)
        text = "" if geometry is None else print_geometry(geometry)
        if self.state.is_joint and is_lowered_late(self.spec):
            dtype = result_dtype(lhs)
            clock, number = find_clock(self.state, _draws(self.spec), site)
            return site_product(
                lhs,
                rhs,
                bias,
                self.state,
                dtype,
                plan_text(self.kind, self.spec, self.kernels, number, text, self.name),
                clock,
                is_weight,
                self.name,
                torch.is_grad_enabled(),
            )
        left, fwd_lhs = self._cast(lhs, 0, site, "x")
        right, fwd_rhs = self._cast(rhs, 1, site, "w")
        bwd_rhs: tuple[Tensor | None, Tensor | None] = (None, None)
        if of[2] == of[1] and (not is_weight or of[1][-1] in "~^"):
            bwd_rhs = fwd_rhs
        elif not is_weight or of[2][-1] == "^":
            bwd_rhs = self._cast(rhs, 2, site, "w_bwd")[1]
        grad_lhs = fwd_lhs if of[3] == of[0] else self._cast(lhs, 3, site, "x_grad")[1]
        operands = (left, right, bias, *fwd_lhs, *fwd_rhs, *bwd_rhs, *grad_lhs, self.state)
        return dialect.gemm(
            *operands, kind=self.kind, spec=self.spec, kernels=self.kernels, site=site, geometry=text, name=self.name
        )

    def _cast(self, x: Tensor, slot: int, site: int, operand: str) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        """What carries the gradient of x; grid and scale."""
        text, state = self.casts[slot], self.state
        spec, owner = text.rstrip("!~^"), f"{self.name}.{operand}".removeprefix(".")
        carrier, scale = x, None
        if text.endswith("^"):
            return x, cast_traced(x, state, spec, site, slot, owner)
        if TRANSFORM in text:
            x = dialect.rotate(x, state, spec=spec, site=site, slot=slot)
        if text.endswith("~"):
            scale = dialect.learned_scale(x, state, spec=spec, quantizer=owner)
            carrier = dialect.carrier(x, scale, state, spec=spec, quantizer=owner)
        elif not text.endswith("!"):
            scale = dialect.scale(x, spec=spec)
        return carrier, (dialect.quantize(x, scale, state, spec=spec, site=site, slot=slot), scale)


def _mark(spec: QuantSpec) -> str:
    if spec.observes:
        return "^"
    return "~" if spec.quantizer else "" if spec.has_scale else "!"


_SLOTS: tuple[tuple[Role, Side], ...] = (("fwd", "lhs"), ("fwd", "rhs"), ("bwd", "rhs"), ("grad", "rhs"))
"""The operands of the casts that a forward makes, by slot."""


@constant_result
def _note_trace(key: str) -> None:
    """Compiled code counts no calls."""
    state = find_state(int(key))
    if state is not None:
        state.calls.are_all = False


@constant_result
def _draws(spec: str) -> bool:
    return LayerSpec.parse(spec).is_stochastic


@constant_result
def _count_call(key: str, site: int) -> int:
    """How many calls of a site the graph that is being traced holds already."""
    return count_in_trace(key, site)
