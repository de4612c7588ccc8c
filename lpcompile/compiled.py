"""Compiled: what lpcompile knows about a model it has compiled. Kept on the model as `_lp_compiled`, outside its
state_dict.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from lpcompile.capture.calls import Calls
from lpcompile.frontends.graph_code import dumps, loads
from lpcompile.frontends.leaves.find import Leaf, Unreached
from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from passes.ir.program import Program
from passes.manager import PassRecord
from runtime.errors import LpError
from runtime.state import RunState

COMPILED = "_lp_compiled"
"""Where a compiled model keeps its Compiled, in the __dict__ of the root."""
JOINT = "_lp_joint"
"""Where a model with a joint front end (lpcompile/frontends/joint/compile_joint.py) keeps what is known of it."""


@dataclass
class PhaseCode:
    """One entry of the policy's schedule, compiled."""

    from_step: int
    policy: Policy
    program: Program
    resolution: Resolution
    records: list[PassRecord]
    num_quantize_before: int
    """lp.quantize nodes before casts are shared."""


@dataclass
class Compiled:
    """The policy, its phases as programs, and the state that the model's ops share."""

    policy: Policy
    state: RunState
    sites: list[Site]
    phases: list[PhaseCode]
    leaves: list[Leaf]
    unreached: list[Unreached]
    calls: Calls
    """Those that example inputs showed; functional GEMMs are found in them."""
    mode: str
    strict: bool

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "phases": dumps(self.phases), "calls": dumps(self.calls)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, phases=loads(state["phases"]), calls=loads(state["calls"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        copied = memo[id(self)] = copy.copy(self)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __copy__(self) -> "Compiled":
        return dataclasses.replace(self)

    @property
    def uncalled(self) -> set[str]:
        """Sites of leaves that no recorded forward called; empty if there was none."""
        return {leaf.name for leaf in self.leaves if self.calls.num and leaf.path not in self.calls.reached}

    @property
    def phase(self) -> PhaseCode:
        return self.phases[self.state.phase]


def find_compiled(model: nn.Module | None) -> Compiled | None:
    """The record of a compiled model, also through one wrapper (DDP, a DeepSpeed engine: anything with `.module`)."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        if COMPILED in inner.__dict__:
            return inner.__dict__[COMPILED]
        inner = inner._modules.get("module")
    return None


def get_compiled(model: nn.Module) -> Compiled:
    compiled = find_compiled(model)
    if compiled is None:
        raise LpError("this model was not compiled", where=type(model).__name__, hint="lpcompile(model, policy) first")
    return compiled
