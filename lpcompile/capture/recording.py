"""What recording a model yields: per module, the graphs of its forward, or the reason why there is none."""

from dataclasses import dataclass, field

from torch import fx
from torch.utils._pytree import TreeSpec

from lpcompile.capture.guards import Guard


@dataclass(frozen=True)
class Recording:
    """One call of one module's forward, as a graph that holds while `guard` holds.

    Placeholders are the distinct tensors and the symbolic sizes among the leaves of (args, kwargs), in order. A size
    that the forward read is a node, computed from those of the placeholders. The output is the flat tuple of
    the leaves of the result. Children are `call_module`, with their path relative to the module.
    A node without users may still matter: in-place operations and grad-mode switches are in program order.
    """

    path: str
    """Path of the module in the model; "" is the model."""
    graph: fx.Graph
    guard: Guard
    out_spec: TreeSpec
    switches_grad_mode: bool

    @property
    def in_spec(self) -> TreeSpec:
        return self.guard.in_spec


@dataclass(frozen=True)
class Opaque:
    """Why a module has no graph. Its original forward runs; its children are recorded all the same."""

    reason: str
    """Completes "the forward of this module ..."."""
    where: str
    """`file:line` inside the forward, or of its definition where the cause has no line."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class RecordResult:
    """The recordings of one forward of a model; a module is in one of the two or, if a leaf or not called, in none."""

    recordings: dict[str, list[Recording]] = field(default_factory=dict)
    opaque: dict[str, Opaque] = field(default_factory=dict)
