"""Watcher: what is measured of each product of a step that is looked at.

    forward      x and w as every cast of FWD, BWD and GRAD that reads them, and as every candidate
    backward     dy, by a hook on the result: the gradient before it is cast

Equal casts of one tensor are measured once. What a checkpoint runs again is counted once: its forward is not looked at
again, and the gradient comes once. BWD and GRAD are of a step if a gradient came for them.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lpcompile.watching.candidates import Candidate
from passes.place import Placed, place
from runtime.kernels.torch_ops import is_transformed
from runtime.numerics.free_axes import Side
from runtime.numerics.specs import ROLES, LayerSpec, QuantSpec, Role
from runtime.ops.contractions import ConvGeometry
from runtime.ops.plan import contraction_of
from runtime.ops.product import Product
from runtime.ops.sum_scales import slot_name
from runtime.quantize.cast_error import CastError, measure
from runtime.quantize.owners import operand_of, owner_of
from runtime.quantize.sampling import ACROSS, Sample, largest_of, run_of, sample_of
from runtime.recomputation import is_recomputing


class Key(NamedTuple):
    """One operand of one GEMM under one cast; `label` names a candidate, and is empty for the cast that ran."""

    site: str
    role: Role
    operand: str
    label: str


@dataclass
class StepRecord:
    """What was measured in one step."""

    step: int
    ran: dict[tuple[str, Role, str], str] = field(default_factory=dict)
    """The cast that ran, by site, role and operand."""
    operands: dict[tuple[str, Role], tuple[str, str]] = field(default_factory=dict)
    """What the left and the right operand are called."""
    largest: dict[tuple[str, str], float] = field(default_factory=dict)
    """max |x| by site and tensor; NaN or Inf where there was one."""
    exponents: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """How many elements of the sample have which exponent, by site and tensor: bin i is 2^(i - 127) to 2^(i - 126)."""
    came: set[tuple[str, Role]] = field(default_factory=set)
    """GEMMs that ran: of BWD and GRAD those for which a gradient came."""
    _sums: defaultdict[Key, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(self, keys: Sequence[Key], sums: Tensor) -> None:
        for key in keys:
            self._sums[key].append(sums)

    def errors(self) -> dict[Key, CastError]:
        """By key, of the GEMMs that ran."""
        ran = {key: sums for key, sums in self._sums.items() if (key.site, key.role) in self.came}
        if not ran:
            return {}
        rows = torch.stack([torch.stack(sums).sum(0).cpu() for sums in ran.values()]).tolist()
        return {key: CastError(*row) for key, row in zip(ran, rows)}


NUM_EXPONENTS = 256
SMALLEST_EXPONENT = -127


@dataclass
class _Casts:
    """What is to be measured of the tensors of a product: by tensor, lhs, rhs or dy, casts and under which keys."""

    lhs: dict[QuantSpec, list[Key]] = field(default_factory=dict)
    rhs: dict[QuantSpec, list[Key]] = field(default_factory=dict)
    dy: dict[QuantSpec, list[Key]] = field(default_factory=dict)
    names: dict[Role, tuple[str, str]] = field(default_factory=dict)

    def of(self, tensor: str) -> dict[QuantSpec, list[Key]]:
        return {"lhs": self.lhs, "rhs": self.rhs, "dy": self.dy}[tensor]


class Watcher:
    """What a RunState's products show themselves to in the steps that are looked at."""

    def __init__(self, candidates: Sequence[Candidate], size: int, op_of: Callable[[str], str]) -> None:
        self.candidates, self.size, self.op_of = candidates, size, op_of
        self.record: StepRecord | None = None
        self.is_open = False
        """Whether forwards are looked at; gradients are as long as there is a record."""
        self.refused: dict[str, dict[str, str]] = {}
        """Site -> candidate -> why it could not run there."""
        self._casts: dict[tuple[str, LayerSpec, ConvGeometry | None], _Casts] = {}

    def see(self, product: Product, y: Tensor, lhs: Tensor, rhs: Tensor, geometry: ConvGeometry | None) -> None:
        """As runtime.state.Watcher says."""
        record = self.record
        if record is None or is_transformed() or not (lhs.is_floating_point() and rhs.is_floating_point()):
            return
        casts = self._casts_of(product, geometry)
        if self.is_open and not is_recomputing():
            record.came.add((product.name, "fwd"))
            self._measure(record, product, "lhs", lhs, casts)
            self._measure(record, product, "rhs", rhs, casts)
        if y.requires_grad:
            roles: list[Role] = [role for role, each in (("bwd", lhs), ("grad", rhs)) if each.requires_grad]  # type: ignore[misc]
            if roles:
                y.register_hook(partial(self._see_gradient, record, product, casts, roles))

    def _see_gradient(
        self, record: StepRecord, product: Product, casts: _Casts, roles: Sequence[Role], dy: Tensor
    ) -> None:
        if record is not self.record:  # a graph of an earlier step, or the end of it all
            return
        record.came.update((product.name, role) for role in roles)
        self._measure(record, product, "dy", dy, casts)

    def _measure(self, record: StepRecord, product: Product, tensor: str, x: Tensor, casts: _Casts) -> None:
        with torch.no_grad(), _disable_current_modes(), torch._C._AutoDispatchBelowAutograd():
            wanted = casts.of(tensor)
            by_run: dict[int, list[QuantSpec]] = {ACROSS: []}
            for spec in wanted:
                by_run.setdefault(run_of(spec), []).append(spec)
            largest, is_batched = largest_of(x.detach()), product.kind == "matmul"
            samples = {run: sample_of(x, self.size, is_batched=is_batched, run=run, largest=largest) for run in by_run}
            for run, specs in by_run.items():
                learned = [_scale_of_state(product, wanted[spec], tensor, x, spec) for spec in specs]
                for spec, sums in zip(specs, measure(samples[run], specs, learned)):
                    record.add(wanted[spec], sums)
            sample = samples[ACROSS]
            self._note(record, product, tensor, sample, casts)

    def _note(self, record: StepRecord, product: Product, tensor: str, sample: Sample, casts: _Casts) -> None:
        name = casts.names["fwd"][tensor == "rhs"] if tensor != "dy" else "dy"
        at = product.name, name
        before = record.largest.get(at, 0.0)
        record.largest[at] = sample.largest if not sample.largest <= before else before
        exponent = sample.wide.float().view(torch.int32).bitwise_right_shift(23).bitwise_and_(255)
        counts = torch.bincount(exponent, minlength=NUM_EXPONENTS)
        counts[0] = 0  # zeros, and what is below 2^-126
        record.exponents[at] = record.exponents[at] + counts if at in record.exponents else counts
        for role in ROLES:
            numbers, names = product.spec.role(role), casts.names[role]
            record.operands[product.name, role] = names
            record.ran[product.name, role, names[0]] = str(numbers.lhs)
            record.ran[product.name, role, names[1]] = str(numbers.rhs)

    def _casts_of(self, product: Product, geometry: ConvGeometry | None) -> _Casts:
        key = product.name, product.spec, geometry
        if key not in self._casts:
            self._casts[key] = self._plan(product, geometry)
        return self._casts[key]

    def _plan(self, product: Product, geometry: ConvGeometry | None) -> _Casts:
        casts, contraction = _Casts(), contraction_of(product.kind, geometry)
        casts.names = {
            role: (slot_name(contraction, role, "lhs"), slot_name(contraction, role, "rhs")) for role in ROLES
        }
        self._lay(casts, product.name, product.spec, ROLES, "")
        refused = self.refused.setdefault(product.name, {})
        for candidate in self.candidates:
            placed = _placed(product.kind, self.op_of(product.name), candidate)
            if isinstance(placed, str):
                refused[candidate.name] = placed
                continue
            fits = [role for role in ROLES if placed.choices[role].fidelity != "refused"]
            if unfit := [role for role in ROLES if role not in fits]:
                refused[candidate.name] = placed.choices[unfit[0]].reason
            self._lay(casts, product.name, placed.spec, fits, candidate.name)
        return casts

    def _lay(self, casts: _Casts, site: str, spec: LayerSpec, roles: Sequence[Role], label: str) -> None:
        for role in roles:
            numbers = spec.role(role)
            sides: tuple[tuple[Side, QuantSpec], ...] = (("lhs", numbers.lhs), ("rhs", numbers.rhs))
            for side, cast in sides:
                key = Key(site, role, casts.names[role][side == "rhs"], label)
                casts.of(_TENSOR[role, side]).setdefault(cast, []).append(key)


@lru_cache(maxsize=4096)
def _placed(kind: str, op: str, candidate: Candidate) -> Placed | str:
    return place(kind, op, candidate.layer(kind), "cpu")


def _scale_of_state(product: Product, keys: Sequence[Key], tensor: str, x: Tensor, spec: QuantSpec) -> Tensor | None:
    """The scale of a quantizer with state, as it is now."""
    if spec.quantizer is None:
        return None
    role = next(key.role for key in keys if not key.label)
    side: Side = "lhs" if _TENSOR[role, "lhs"] == tensor else "rhs"
    quantizer = product.state.quantizers[owner_of(product.name, operand_of(product.spec, role, side))]
    scale: Tensor = quantizer.step() if spec.quantizer.learns else quantizer.scale(x)
    return scale.detach()


_TENSOR: Mapping[tuple[Role, Side], str] = {
    ("fwd", "lhs"): "lhs", ("fwd", "rhs"): "rhs", ("bwd", "lhs"): "dy",
    ("bwd", "rhs"): "rhs", ("grad", "lhs"): "dy", ("grad", "rhs"): "lhs",
}  # fmt: skip
"""Which tensor of a product an operand is."""
