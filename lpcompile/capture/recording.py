"""What recording a model yields: per module, the graphs of its forward, or the reason why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx
from torch.utils._pytree import TreeSpec

from lpcompile.capture.guards import Guard
from lpcompile.frontends.graph_code import is_same_graph
from passes.ir.gemm_nodes import Reading


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
class LostProduct:
    """A product of matrices that a module without a graph writes as an operation: it runs as in the original."""

    gemm: Reading
    where: str
    """`file:line`."""


@dataclass(frozen=True)
class Opaque:
    """Why a module has no graph. Its original forward runs; its children are recorded all the same."""

    reason: str
    """Completes "the forward of this module ..."."""
    where: str
    """`file:line` inside the forward, or of its definition where the cause has no line."""
    products: tuple[LostProduct, ...] = ()
    """In program order, those of the children left out."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class RecordResult:
    """The recordings of one forward of a model; a module is in one of the two or, if a leaf or not called, in none."""

    recordings: dict[str, list[Recording]] = field(default_factory=dict)
    opaque: dict[str, Opaque] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    """Every module that was called, leaves and what they call included."""


def merged(earlier: Sequence[Recording], later: Sequence[Recording]) -> list[Recording]:
    """Both, less what an earlier one stands for already; one that differs only in the training mode of its call, and
    has the same graph, stands for the two.

    A module that reads its training mode without passing it on to an operation (to count, say) is opaque already.
    """
    found = list(earlier)
    for recording in later:
        guard = replace(recording.guard, training=None)
        for index, twin in enumerate(found):
            if replace(twin.guard, training=None) != guard:
                continue
            if twin.guard.training in (None, recording.guard.training):
                break
            if is_same_graph(twin.graph, recording.graph):
                found[index] = replace(twin, guard=guard)
                break
        else:
            found.append(recording)
    return found
