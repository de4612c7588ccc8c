"""Exported forward: what a model runs for the calls that an exported graph stands for; other calls run as ever.

In evaluation mode, without gradients or autocast, with arguments like the example's and sizes as the graph's rules say.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from lpcompile.frontends.export.facts import Facts
from lpcompile.frontends.export.sizes import SizeRules
from lpcompile.frontends.export.trace import Exported
from lpcompile.frontends.graph_code import GraphCode, dumps, loads
from lpcompile.frontends.install import Record, install, installed
from passes.ir.program import STATE
from runtime.state import RunState


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call by name, and what they were: the tensors' kinds, and the plain values."""

    names: tuple[str, ...]
    """Of the parameters that may be given by position; empty where the signature has others, and calls are as given."""
    defaults: Mapping[str, Any]
    in_spec: pytree.TreeSpec
    kinds: tuple[Any, ...]
    """Of each leaf: (dtype, device, rank, whether contiguous) of a tensor, or the value."""

    @staticmethod
    def of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Arguments":
        parameters = inspect.signature(model.forward).parameters.values()
        names: tuple[str, ...] = ()
        defaults: dict[str, Any] = {}
        if all(each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY, each.VAR_KEYWORD) for each in parameters):
            names = tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
            defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        draft = Arguments(names, defaults, pytree.tree_structure(None), ())
        leaves, spec = pytree.tree_flatten(draft.named(args, kwargs))
        return Arguments(names, defaults, spec, tuple(map(_kind_of, leaves)))

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with every argument by name, in the order of the names, and without those at their defaults."""
        if not self.names or len(args) > len(self.names) or not kwargs.keys().isdisjoint(self.names[: len(args)]):
            return tuple(args), dict(kwargs)
        given = {**dict(zip(self.names, args)), **kwargs}
        return (), {
            name: given[name]
            for name in sorted(given)
            if name not in self.defaults or given[name] is not self.defaults[name]
        }

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
        """The tensors of a call like the example's; None for another call."""
        leaves, spec = pytree.tree_flatten(self.named(args, kwargs))
        if spec != self.in_spec:
            return None
        tensors = []
        for leaf, kind in zip(leaves, self.kinds):
            if isinstance(leaf, Tensor):
                if _kind_of(leaf) != kind:
                    return None
                tensors.append(leaf)
            elif type(leaf) is not type(kind) or leaf != kind:
                return None
        return tensors


class _Kind(NamedTuple):
    """Of a tensor, what a graph relies on beside its sizes."""

    type: type
    dtype: torch.dtype
    device: torch.device
    rank: int
    is_contiguous: bool


def _kind_of(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    kind = Tensor if type(leaf) is nn.Parameter else type(leaf)
    return _Kind(kind, leaf.dtype, leaf.device, leaf.dim(), leaf.layout is torch.strided and leaf.is_contiguous())


@dataclass
class ExportedForward:
    """The record of a root: its graphs, one per phase of the schedule, and the record that it had before."""

    arguments: Arguments
    sizes: SizeRules
    out_spec: pytree.TreeSpec
    codes: list[GraphCode]
    state: RunState
    before: Record | None
    facts: Facts
    num_calls: int = 0
    num_unserved: int = 0
    first_unserved: str = ""
    """Why the first call that the graph did not stand for was another."""

    @staticmethod
    def install(
        model: nn.Module,
        example: tuple[tuple[Any, ...], Mapping[str, Any]],
        exported: Exported,
        graphs: Sequence[fx.Graph],
        state: RunState,
    ) -> None:
        """Let `graphs`, those of the phases, run for calls like the example; the last thing that is installed."""
        arguments, before = Arguments.of(model, *example), installed(model)
        codes = [GraphCode(graph) for graph in graphs]
        vars(model)[STATE] = state
        record = ExportedForward(arguments, exported.sizes, exported.out_spec, codes, state, before, Facts())
        install(model, record)
        record.facts = Facts.of(model, exported.training)

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if not torch.compiler.is_compiling():  # torch.compile fuses by itself
            tensors = self.fitting(args, kwargs)
            if isinstance(tensors, list):
                self.num_calls += 1
                results = self.codes[self.state.phase_in(is_training=False)](module, tensors)
                return results[0] if self.out_spec.is_leaf() else pytree.tree_unflatten(results, self.out_spec)
            self.num_unserved += 1
            self.first_unserved = self.first_unserved or tensors
        if self.before is not None:
            return self.before.run(module, original, args, kwargs)
        return original(module, *args, **kwargs)

    def fitting(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor] | str:
        """The tensors of a call that the graph stands for, or why it does not."""
        if torch.is_grad_enabled():
            return "gradients are on"
        if torch._C._is_any_autocast_enabled():
            return "autocast is on"
        if torch_module._has_any_global_hook():
            return "every module has hooks"
        tensors = self.arguments.tensors(args, kwargs)
        if tensors is None:
            return "the arguments are not those of the example: others, or of another dtype, device or layout"
        if not self.sizes.fits(*tensors):
            return "a size is one that the forward was not exported for"
        return self.facts.differing() or tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExportedForward":
        copied = memo[id(self)] = copy.copy(self)
        for name in ("state", "before", "facts"):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied

    def __copy__(self) -> "ExportedForward":
        return dataclasses.replace(self)

    def __getstate__(self) -> dict[str, Any]:
        specs = dumps((self.arguments, self.out_spec, self.codes))  # which torch.save's protocol cannot name
        return {**vars(self), "arguments": specs, "out_spec": None, "codes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.arguments, self.out_spec, self.codes = loads(state["arguments"])
