"""Compiled: what lpcompile knows about a model it has compiled. Kept on the model as `_lp_compiled`, outside its
state_dict.
"""

import copy
import dataclasses
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lpcompile.errors import LoweringError, LoweringWarning
from lpcompile.frontends.graph_code import dumps, loads
from lpcompile.frontends.joint.captured import Captured
from lpcompile.frontends.leaves.find import Leaf
from lpcompile.plan import PhaseCode, Sight, number_found, number_sites
from lpcompile.policy.describe import classes_of, describe
from lpcompile.policy.patterns import count_layers, layer_of
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from runtime.errors import LpError
from runtime.ops.product import Product
from runtime.state import RunState

COMPILED = "_lp_compiled"
"""Where a compiled model keeps its Compiled, in the __dict__ of the root."""


@dataclass
class Compiled:
    """The policy, its phases, and the state that the model's products share."""

    policy: Policy
    state: RunState
    sites: list[Site]
    phases: list[PhaseCode]
    leaves: list[Leaf]
    unreached: dict[str, str]
    """Path of a module that multiplies matrices where nothing of ours sees it -> why."""
    mode: str
    strict: bool
    called: frozenset[str] | None = None
    """Paths of the leaves that the example calls ran; None if there were none."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Of the sites that a policy names: what keys their random streams."""
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of every module by its path, as rules name them."""
    own_forwards: frozenset[str] = frozenset()
    """Paths of the modules that had a forward on the instance when they were compiled."""
    num_layers: Mapping[str, int] = field(default_factory=dict)
    """How many layers the model has, by the path before their number."""
    joint: Captured | None = None
    """What the joint front end captured, if torch.compile runs the model by it."""

    def __getstate__(self) -> dict[str, Any]:
        kept = {**vars(self), "joint": None}  # a copy is not under torch.compile
        return {**kept, "phases": dumps(self.phases)} if self._has_graphs else kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        phases = state["phases"]
        vars(self).update(state, phases=loads(phases) if isinstance(phases, bytes) else phases)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        copied = memo[id(self)] = copy.copy(self)
        vars(copied).update(copy.deepcopy(vars(self), memo), joint=None)
        return copied

    def __copy__(self) -> "Compiled":
        return dataclasses.replace(self)

    @property
    def uncalled(self) -> set[str]:
        """Sites of leaves that no example call ran; empty if there was none."""
        return set() if self.called is None else {leaf.name for leaf in self.leaves if leaf.path not in self.called}

    @property
    def phase(self) -> PhaseCode:
        """The entry of the schedule in force."""
        return self.phases[self.state.phase]

    def phase_of(self, root: nn.Module) -> PhaseCode:
        """What holds for the model as it is, in training or evaluation mode."""
        return self.phases[self.state.phase_in(root.training)]

    def add_all(self, model: nn.Module, sights: Sequence[Sight]) -> None:
        """Ask every phase of the policy about all products that are known when the model is compiled."""
        leaves = {leaf.path for leaf in self.leaves}
        called = None if self.called is None else self.called & leaves
        self.classes = {path: classes_of(module) for path, module in model.named_modules()}
        self.own_forwards = frozenset(path for path, module in model.named_modules() if "forward" in vars(module))
        self.num_layers = count_layers([path for path, _ in model.named_parameters(remove_duplicate=False)])
        self._add(sights, describe([self.site_of(each) for each in sights], model, called), are_all=True)

    def site_of(self, sight: Sight) -> Site:
        """What rules are asked about."""
        count = sum(leaf.index is not None for leaf in self.leaves)
        owner = sight.owner
        classes = () if owner is None else self.classes.get(owner, ())
        stem, _ = layer_of(sight.name) or ("", 0)
        num_layers = self.num_layers.get(stem)
        return Site(sight.name, sight.op, sight.index, count, sight.n, sight.k, classes, owner, num_layers)

    def _add(self, sights: Sequence[Sight], sites: Sequence[Site], are_all: bool = False) -> None:
        self.sites += sites
        asked = [phase.ask(sights, sites, are_all) for phase in self.phases]
        named = {name: None for specs in asked for name in specs}
        if are_all:
            self.numbers = number_sites([*named])
        for name in named:
            self.numbers.setdefault(name, number_found(name, self.numbers))
        for phase, specs in zip(self.phases, asked):
            phase.place(sights, specs, self.state, self.numbers)

    def find(self, sight: Sight) -> list[Product | None]:
        """What runs a product that a scope sees, by phase; one that is new is planned now. Raises LoweringError for one
        that does not run as the policy says, if the model was compiled as strict.
        """
        with _PLANNING:
            if not any(sight.name in phase.resolution.specs for phase in self.phases):
                self._add([sight], [self.site_of(sight)])
                for phase in self.phases:
                    for name, reason in phase.program.reasons(sight.name) if self.strict else ():
                        raise LoweringError(
                            reason,
                            where=f"{name}, policy {phase.policy.name}, strict",
                            expected="every named GEMM to run as its policy says",
                            hint="strict=False, or another rule for it",
                        )
                for name, reason in self.phase.program.reasons(sight.name):
                    warnings.warn(f"{name} runs as in the uncompiled model: {reason}", LoweringWarning, stacklevel=2)
        return [phase.products.get(sight.name) for phase in self.phases]

    @property
    def _has_graphs(self) -> bool:
        return any(phase.program.units for phase in self.phases)


def find_compiled(model: nn.Module | None) -> Compiled | None:
    """The record of a compiled model, also of one inside of `model`: under DDP, a DeepSpeed engine, PEFT, or a module
    of one's own; None if there is none, or several.
    """
    root = None if model is None else find_root(model)
    return None if root is None else vars(root)[COMPILED]


def find_root(model: nn.Module) -> nn.Module | None:
    """The compiled model in `model`, which may be itself; None if there is none, or several."""
    root = root_below_engines(model)
    if root is None and len(roots := compiled_parts(model)) == 1:
        root = roots[0][1]
    return root


def root_below_engines(model: nn.Module) -> nn.Module | None:
    """The compiled model that is `model` or its `.module`, as DDP and DeepSpeed have it."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        if COMPILED in vars(inner):
            return inner
        inner = inner._modules.get("module")
    return None


def compiled_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of everything below `model` that lpcompile() compiled."""
    return [(path, module) for path, module in model.named_modules() if COMPILED in vars(module)]


def get_root(model: nn.Module) -> nn.Module:
    """find_root, or LpError."""
    root = find_root(model)
    if root is not None:
        return root
    where = type(model).__name__
    if parts := [path for path, _ in compiled_parts(model)]:
        what = f"it holds {len(parts)} models that were compiled apart"
        raise LpError(what, where=where, expected="one", got=", ".join(parts), hint=f"one of them, .{parts[0]}")
    raise LpError("this model was not compiled", where=where, hint="lpcompile(model, policy) first")


def get_compiled(model: nn.Module) -> Compiled:
    """find_compiled, or LpError."""
    compiled: Compiled = vars(get_root(model))[COMPILED]
    return compiled


def end_joint(root: nn.Module, compiled: Compiled | None) -> None:
    """What torch.compile made of a compilation is not called any more."""
    if compiled is not None and compiled.joint is not None:
        compiled.joint, compiled.state.is_joint = None, False
        root._compiled_call_impl = None


_PLANNING = threading.Lock()
