"""Facts: what an exported graph relies on in the modules of its model, compared at every call in a few microseconds.

A forward reads plain attributes, children, configs, and of its parameters and buffers that they are there, their sizes,
dtypes and devices; their values the graph reads live. Hooks and a forward of an instance's own see what no graph shows.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from lpcompile.frontends.install import ORIGINAL, RECORD, captured_class
from passes.ir.program import STATE

_Held = tuple[Any, int, Callable[[dict[str, Any]], Any], Any, str]
"""A module or a config, how many attributes it has, how to read those that count, what they were, and its name."""


@dataclass
class Facts:
    """Of all modules of a model, as they were when this was made."""

    types: list[tuple[nn.Module, type]] = field(default_factory=list)
    held: list[_Held] = field(default_factory=list)
    tensors: list[tuple[dict[str, Any], str, Any, Any, Any, str]] = field(default_factory=list)
    """(dict, name, shape, dtype, device, path)"""
    tied: list[tuple[dict[str, Any], str, dict[str, Any], str, str]] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module) -> "Facts":
        facts, seen, owners = Facts(), set[int](), dict[int, tuple[dict[str, Any], str]]()
        for path, module in model.named_modules():
            facts.types.append((module, type(module)))
            own = vars(module)
            facts._hold(
                module, path, [name for name in own if name not in _OTHERS and not (name in _HOOKS and not path)]
            )
            for name in ("_parameters", "_buffers"):
                facts._hold_tensors(own[name], path, owners)
            for name, value in own.items():
                config = None if name in _OTHERS else getattr(value, "__dict__", None)
                is_plain = not isinstance(value, (Tensor, nn.Module, type, dict, list, set)) and not callable(value)
                if type(config) is dict and is_plain and id(config) not in seen:
                    seen.add(id(config))
                    facts._hold(value, f"{path} {type(value).__name__}".lstrip(), list(config))
        return facts

    def _hold(self, owner: Any, path: str, names: list[str]) -> None:
        own = vars(owner)
        if len(names) > 1:
            values = tuple(_kept(own[name]) for name in names)
            self.held.append((owner, len(own), itemgetter(*names), values, path))

    def _hold_tensors(self, tensors: dict[str, Any], path: str, owners: dict[int, tuple[dict[str, Any], str]]) -> None:
        for name, value in tensors.items():
            whole = f"{path}.{name}".lstrip(".")
            meta = (None, None, None) if value is None else (value.shape, value.dtype, value.device)
            self.tensors.append((tensors, name, *meta, whole))
            if value is not None and id(value) in owners:
                self.tied.append((tensors, name, *owners[id(value)], whole))
            elif value is not None:
                owners[id(value)] = tensors, name

    def differing(self) -> str | None:
        """What is no longer as it was, in words; None if all is."""
        for module, kind in self.types:
            if type(module) is not kind:
                return f"a {kind.__name__} has another class"
        for owner, size, read, values, path in self.held:
            own = owner.__dict__  # a copied object has a new one
            try:
                if len(own) != size or read(own) != values:
                    return f"attributes, children or hooks of {path or 'the model'} are others"
            except Exception:  # one is gone, or two do not compare
                return f"attributes of {path or 'the model'} are others"
        for tensors, name, shape, dtype, device, path in self.tensors:
            value = tensors.get(name)
            if value is None:
                if dtype is not None:
                    return f"{path} is gone"
            elif value.dtype is not dtype or value.shape != shape or value.device != device:
                return f"{path} has another size, dtype or device"
        for tensors, name, others, other, path in self.tied:
            if tensors.get(name) is not others.get(other):
                return f"{path} is no longer tied"
        return None

    def __getstate__(self) -> dict[str, Any]:
        kinds = [(module, vars(kind).get(ORIGINAL, kind), ORIGINAL in vars(kind)) for module, kind in self.types]
        return {**vars(self), "types": kinds}  # classes of ours have no name

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        kinds = [(module, captured_class(kind) if is_ours else kind) for module, kind, is_ours in state["types"]]
        self.types = kinds


def _kept(value: Any) -> Any:
    """What a later value is compared with: a container as it is now, another object itself."""
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip
"""Of the root they run around its forward, whatever that is."""
_OTHERS = frozenset(
    {"_parameters", "_buffers", "_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks"}
    | {"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", RECORD, STATE, "_lp_compiled", "_flat_weights"}
)
"""Held in another way, or read by no forward."""
