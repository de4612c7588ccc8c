"""Variants: the graphs of a module's recorded calls as its forward, each under its guard; for mode="infer"."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lpcompile.capture.children import Children
from lpcompile.capture.guards import Guard
from lpcompile.capture.recording import Recording
from lpcompile.frontends import install as classes
from lpcompile.frontends.graph_code import GraphCode, dumps, loads


class Clock(Protocol):
    """Says which phase of a policy schedule it is."""

    phase: int


@dataclass(frozen=True)
class Variant:
    """A generated forward and when it holds."""

    guard: Guard
    code: GraphCode
    out_spec: pytree.TreeSpec
    children: Children = field(default_factory=Children)

    @staticmethod
    def of(recording: Recording, graph: fx.Graph | None = None) -> "Variant":
        """The variant of a recording, with `graph` in place of the recorded one: same placeholders, same outputs."""
        code = GraphCode(graph or recording.graph, switches_grad_mode=recording.switches_grad_mode)
        return Variant(recording.guard, code, recording.out_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Variant":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # bytes, since pickle's protocols 2 and 3 (torch.save) cannot name what torch has in guards and graphs
        return _load_variant, (dumps((self.guard, self.code, self.out_spec)), self.children)

    def match(
        self, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> list[torch.Tensor | int] | str:
        """The graph's operands, or why it does not hold for this call."""
        differing = self.children.differing(module)
        return self.guard.match(module, args, kwargs) if differing is None else differing

    def run(self, module: nn.Module, operands: Sequence[torch.Tensor | int]) -> Any:
        outputs = self.code(module, operands)
        if self.out_spec.is_leaf():
            return outputs[0]
        return pytree.tree_unflatten(outputs, self.out_spec)


@dataclass
class CapturedForward:
    """What is installed under one module, and how often it held."""

    variants_by_phase: list[list[Variant]] = field(default_factory=list)
    clock: Clock | None = None
    """None: phase 0 for ever. A phase with no variants is the original forward."""
    num_hits: int = 0
    num_misses: int = 0
    first_miss: str | None = None

    @property
    def variants(self) -> list[Variant]:
        """Those of the present phase."""
        phase = 0 if self.clock is None else self.clock.phase
        return self.variants_by_phase[phase] if phase < len(self.variants_by_phase) else []

    def run(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The forward: the first variant whose guard holds, else the original."""
        variants = self.variants
        for variant in variants:
            operands = variant.match(module, args, kwargs)
            if not isinstance(operands, str):
                if not torch.compiler.is_compiling():  # where a counter would become a guard
                    self.num_hits += 1
                return variant.run(module, operands)
        if variants and not torch.compiler.is_compiling():
            self.num_misses += 1
            if self.first_miss is None:
                # what another variant says of the same training mode tells more than that the mode is another
                nearest = next((v for v in variants if v.guard.training in (None, module.training)), variants[0])
                why = nearest.match(module, args, kwargs)
                self.first_miss = why if isinstance(why, str) else None
        return original(module, *args, **kwargs)

    @property
    def is_picklable(self) -> bool:
        return all(variant.code.is_picklable for variants in self.variants_by_phase for variant in variants)


def install(module: nn.Module, variants: Sequence[Variant], *, phase: int = 0, clock: Clock | None = None) -> None:
    """Let `variants`, tried in order, be the forward of `module` in this phase. Replaces those of an earlier install.

    `clock.phase` is read at every call; a clock given once stays.
    """
    record = captured(module)
    if record is None:
        record = CapturedForward()
        classes.install(module, record)
    while len(record.variants_by_phase) <= phase:
        record.variants_by_phase.append([])
    record.variants_by_phase[phase] = [replace(variant, children=_children(module, variant)) for variant in variants]
    for variant in variants:
        variant.code.compiled()
    record.clock = clock or record.clock


def _children(module: nn.Module, variant: Variant) -> Children:
    """Those that the graph calls, or that were folded into what it calls."""
    called = [str(node.target) for node in variant.code.graph.find_nodes(op="call_module")]
    return Children.of(module, (*called, *variant.guard.unhooked))


def captured(module: nn.Module) -> CapturedForward | None:
    """What is installed under the module."""
    return classes.installed(module)


def _load_variant(held: bytes, children: Children) -> Variant:
    guard, code, out_spec = loads(held)
    return Variant(guard, code, out_spec, children)
