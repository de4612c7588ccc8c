"""Plan: what a policy makes of the products of a model, known when it is compiled or found as they run.

sights   products by name, op, kind and sizes          from leaves, from one look at a call, or from a call
phases   per entry of the schedule: spec, backend and reason of each site, findings
products what runs a site in each phase
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from passes.analysis.lengths import Lengths
from passes.choose_accumulator import ChooseAccumulator
from passes.ir.program import Program
from passes.manager import PassRecord
from passes.place import Placed, place
from runtime.numerics.specs import LayerSpec
from runtime.ops.product import Product
from runtime.quantize.owners import quantizers_in
from runtime.state import RunState


@dataclass(frozen=True)
class Sight:
    """One product, as far as it is known before a policy is asked. `kind` is a row of runtime.ops.layer.KINDS, or conv;
    n and k the sizes of a layer's weight, `index` its place among the leaves. `reason`: why it has no lp form.
    """

    name: str
    op: str
    kind: str
    n: int | None = None
    k: int | None = None
    lengths: Lengths = field(default_factory=dict)
    index: int | None = None
    reason: str = ""
    owner: str | None = None
    """Path of the module that writes it; None of a leaf."""
    unreal: str = ""
    """Why the operands that were seen cannot be cast, which the identity does not do."""


@dataclass
class PhaseCode:
    """One entry of the policy's schedule, or what holds in evaluation, compiled. `program` keeps specs, choices,
    refusals and findings; only what is compiled from whole graphs has graphs in it.
    """

    from_step: int | None
    """None: of modules in evaluation mode."""
    policy: Policy
    program: Program
    resolution: Resolution
    records: list[PassRecord] = field(default_factory=list)
    num_quantize_before: int = 0
    """Casts of a forward pass before sharing."""
    num_quantize_after: int = 0
    """Casts of a forward pass as it runs."""
    products: dict[str, Product] = field(default_factory=dict)

    @staticmethod
    def of(from_step: int | None, policy: Policy, device: str) -> "PhaseCode":
        """Of a policy that was asked nothing yet."""
        return PhaseCode(from_step, policy, Program({}, {}, device=device), Resolution({}, {}))

    def ask(self, sights: Sequence[Sight], sites: Sequence[Site], are_all: bool) -> dict[str, LayerSpec]:
        """What the policy says of more products, `sites`, with every accumulator chosen."""
        found = self.policy.resolve(sites)
        if are_all:
            self.resolution = found
        else:
            self.resolution.specs.update(found.specs)
            self.resolution.rule_of.update(found.rule_of)
        named = {name: spec for name, spec in found.specs.items() if spec is not None}
        part = Program({}, named, device=self.program.device)
        ChooseAccumulator().choose(part, {sight.name: sight.lengths for sight in sights})
        self.program.specs |= part.specs
        self.program.decisions |= part.decisions
        self.program.findings += part.findings
        return part.specs

    def place(
        self, sights: Sequence[Sight], specs: Mapping[str, LayerSpec], state: RunState, numbers: Mapping[str, int]
    ) -> None:
        """Choose what runs the products that the policy names, or say why nothing does."""
        for sight in sights:
            if sight.name in specs:
                self._place(sight, specs[sight.name], state, numbers)

    def _place(self, sight: Sight, spec: LayerSpec, state: RunState, numbers: Mapping[str, int]) -> None:
        placed: Placed | str = sight.reason or ("" if spec.is_identity else sight.unreal)
        number = numbers[sight.name]
        if not placed and number >= _FIRST_FOUND and quantizers_in(spec):
            placed = "its quantizer has state, and the product was found after that was made: give example inputs"
        placed = placed or place(sight.kind, sight.op, spec, self.program.device, sight.lengths)
        if isinstance(placed, str):
            self.program.refusals[sight.name] = placed
            return
        self.program.choices[sight.name] = placed.choices
        stride = 1 if number >= _FIRST_FOUND else len(numbers)
        self.products[sight.name] = Product(
            sight.name, sight.kind, placed.spec, placed.kernels, number, state, group_stride=stride
        )


def expecting(policy: Policy, resolution: Resolution, possible: Sequence[Site]) -> Resolution:
    """A resolution in which no rule is told to match nothing that one of the `possible` sites, which calls may yet
    show, would give something to decide.
    """
    waiting = {
        use.label
        for rule, use in zip(policy.rules, resolution.rules)
        if not use.num_rows and not use.sites and any(rule.match.may_match(site) for site in possible)
    }
    rules = [replace(use, is_told=False, is_waiting=True) if use.label in waiting else use for use in resolution.rules]
    return replace(resolution, rules=rules)


def count_casts(phase: PhaseCode, operands: Mapping[str, tuple[Hashable, Hashable]]) -> tuple[int, int]:
    """Casts of a forward pass of these products, before casts are shared and after. `operands`: which tensors a site
    reads, by any mark that tells two tensors apart; a site that is not in it reads tensors of its own.
    """
    before, after = 0, set[Hashable]()
    for name, product in phase.products.items():
        lhs, rhs = operands.get(name, ((name, "lhs"), (name, "rhs")))
        spec = product.spec
        lhs, rhs = (
            (name, mark) if cast.quantizer else mark for mark, cast in ((lhs, spec.fwd.lhs), (rhs, spec.fwd.rhs))
        )
        casts = [(lhs, spec.fwd.lhs), (rhs, spec.fwd.rhs)]
        casts += [(lhs, spec.grad.rhs)] if spec.grad.rhs != spec.fwd.lhs else []
        casts += [(rhs, spec.bwd.rhs)] if product.kind == "matmul" and spec.bwd.rhs != spec.fwd.rhs else []
        before += len(casts)
        after |= {(each, name if each[1].rounding == "stochastic" else "") for each in casts}
    return before, len(after)


def number_sites(names: Sequence[str]) -> dict[str, int]:
    """The numbers that key the random streams of the sites a policy names, known when a model is compiled: by name."""
    return {name: number for number, name in enumerate(sorted(names))}


def number_found(name: str, taken: Mapping[str, int]) -> int:
    """That of a site found while the model runs: of its name, whatever else was found before."""
    number, used = crc32(name.encode()) % _FIRST_FOUND, set(taken.values())
    while _FIRST_FOUND + number in used:
        number = (number + 1) % _FIRST_FOUND
    return _FIRST_FOUND + number


_FIRST_FOUND = 1 << 17
"""Streams have 18 bits for the site: half for what is known when compiling, half for what is found."""
