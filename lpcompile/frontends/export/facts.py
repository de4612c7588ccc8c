"""Facts: what an exported graph relies on in the modules of its model, compared at every call in a few microseconds.

A forward reads plain attributes, children, configs and what they hold, and of its parameters and buffers that they are
there, their sizes, dtypes and devices; their values the graph reads live. Hooks and a forward of an instance's own see
what no graph shows.
"""

import copy
from collections import deque
from collections.abc import Callable, Mapping
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
    num_owned: int = 1
    """How many different objects the tensors are, and None."""
    marks: list[tuple[Any, Any, str]] = field(default_factory=list)
    """Tensors and arrays in containers and configs, with what a write into them moves, and their place."""

    @staticmethod
    def of(model: nn.Module, training: Mapping[str, bool]) -> "Facts":
        """`training`: what it was of the modules, by their path, when the graph was made."""
        facts, seen, owners = Facts(), set[int](), dict[int, tuple[dict[str, Any], str]]()
        for path, module in model.named_modules():
            facts.types.append((module, type(module)))
            own = vars(module)
            names = [name for name in own if name not in _OTHERS and not (name in _HOOKS and not path)]
            if path not in training:
                names.remove("training")
            facts._hold(module, path, names, {**own, "training": training.get(path)})
            for name in ("_parameters", "_buffers"):
                facts._hold_tensors(own[name], path, owners)
            for name in names:
                if not isinstance(own[name], Tensor):  # which is read live
                    facts._hold_inside(own[name], path, seen)
        facts.num_owned += len(owners)
        return facts

    def _hold(self, owner: Any, path: str, names: list[str], own: dict[str, Any]) -> None:
        read: Callable[[dict[str, Any]], Any] = itemgetter(*names, names[0]) if names else tuple  # of one not itself
        self.held.append((owner, len(vars(owner)), read, _kept(read(own)), path))

    def _hold_inside(self, value: Any, path: str, seen: set[int]) -> None:
        """Configs, tensors and arrays in an attribute, whatever containers and configs they lie in."""
        waiting = [(value, path)]
        while waiting:
            value, path = waiting.pop()
            if id(value) in seen or isinstance(value, (nn.Module, type)):
                continue
            seen.add(id(value))
            if mark_of(value) is not None:
                self.marks.append((value, mark_of(value), path))
            elif isinstance(value, CONTAINERS):
                waiting += [(each, path) for each in items_of(value)]
            elif (
                not isinstance(value, Tensor) and not callable(value) and type(getattr(value, "__dict__", None)) is dict
            ):
                path = f"{path} {type(value).__name__}".lstrip()
                self._hold(value, path, list(vars(value)), vars(value))
                waiting += [(each, path) for each in vars(value).values()]

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
        owned = {id(None)}
        for tensors, name, shape, dtype, device, path in self.tensors:
            value = tensors.get(name)
            owned.add(id(value))
            if value is None:
                if dtype is not None:
                    return f"{path} is gone"
            elif value.dtype is not dtype or value.shape != shape or value.device != device:
                return f"{path} has another size, dtype or device"
        for tensors, name, others, other, path in self.tied:
            if tensors.get(name) is not others.get(other):
                return f"{path} is no longer tied"
        if len(owned) != self.num_owned:
            return "parameters or buffers are tied that were not"
        for value, mark, path in self.marks:
            if mark_of(value) != mark:
                return f"a tensor or an array in an attribute of {path or 'the model'} was written into"
        return None

    def __getstate__(self) -> dict[str, Any]:
        kinds = [(module, vars(kind).get(ORIGINAL, kind), ORIGINAL in vars(kind)) for module, kind in self.types]
        marks = [
            (value, mark_of(value) == mark, path) for value, mark, path in self.marks
        ]  # a copy's version is its own
        return {**vars(self), "types": kinds, "marks": marks}  # classes of ours have no name

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        kinds = [(module, captured_class(kind) if is_ours else kind) for module, kind, is_ours in state["types"]]
        self.types = kinds
        self.marks = [(value, mark_of(value) if is_same else "", path) for value, is_same, path in state["marks"]]


def _kept(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """What a later value is compared with: a container as it is now, with what it holds, another object itself."""
    if id(value) in inside:
        return value
    inside = *inside, id(value)
    if isinstance(value, dict):
        return {key: _kept(each, inside) for key, each in value.items()}
    for kind in (list, tuple, deque):
        if isinstance(value, kind):
            return kind(_kept(each, inside) for each in value)
    return copy.copy(value) if isinstance(value, set) else value


def mark_of(value: Any) -> Any:
    """What a write or a draw moves: of a tensor its version, of an array of numpy or a bytearray its bytes, of a
    generator of numpy its state; None of others.
    """
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if type(value).__module__.partition(".")[0] == "numpy":
        bits = getattr(value, "bit_generator", getattr(value, "_bit_generator", None))
        is_array = type(value).__name__ == "ndarray"
        return value.tobytes() if is_array else None if bits is None else str(bits.state)
    return bytes(value) if type(value) is bytearray else None


def items_of(container: Any) -> list[Any]:
    """What a container holds."""
    return [*container.values()] if isinstance(container, dict) else [*container]


CONTAINERS = (dict, list, tuple, set, frozenset, deque)
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
