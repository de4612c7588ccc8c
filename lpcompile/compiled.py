"""Compiled: what lpcompile knows about a model it has compiled. Kept on the model as `_lp_compiled`, outside its
state_dict.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lpcompile.capture.leaves import Unreached
from lpcompile.policy import Policy, Resolution, Site
from passes.ir.program import Program
from passes.manager import PassRecord
from runtime.errors import LpError
from runtime.state import RunState

_KEY = "_lp_compiled"


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
    unreached: list[Unreached]
    opaque: dict[str, str] = field(default_factory=dict)
    """Modules that could not be recorded, with the reason; their leaves are compiled all the same."""
    captured: bool = False
    """True if example inputs were given, so that functional GEMMs could be found."""

    @property
    def phase(self) -> PhaseCode:
        return self.phases[self.state.phase]


def set_compiled(model: nn.Module, compiled: Compiled | None) -> None:
    if compiled is None:
        model.__dict__.pop(_KEY, None)
    else:
        model.__dict__[_KEY] = compiled


def find_compiled(model: nn.Module) -> Compiled | None:
    """The record of a compiled model, also through one wrapper (DDP, a DeepSpeed engine: anything with `.module`)."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        if _KEY in inner.__dict__:
            return inner.__dict__[_KEY]
        inner = inner._modules.get("module")
    return None


def get_compiled(model: nn.Module) -> Compiled:
    compiled = find_compiled(model)
    if compiled is None:
        raise LpError("this model was not compiled", where=type(model).__name__, hint="lpcompile(model, policy) first")
    return compiled
