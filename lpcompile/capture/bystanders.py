"""Bystanders: what a recording must leave as it found it, and what a forward changed on the Python side.

A live forward draws random numbers, moves batch-norm statistics and may write attributes. `Bystanders` puts all of it
back; `PythonState` tells which module attributes changed between two points of a forward.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lpcompile.capture.guards import is_plain


class PythonState:
    """A shallow copy of the __dict__ of modules, of the containers in it and of plain objects (configurations)."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._saved = [_Saved(module) for module in modules]
        self._generators = _Generators()

    def restore(self) -> None:
        for saved in self._saved:
            saved.restore()
        self._generators.restore()


class Watch:
    """What a forward changes on the Python side between two of its calls of children.

    Looked at are the module itself, whatever user's container or configuration it or a descendant holds, and each
    descendant from the moment that the forward first reads or writes one of its attributes (`add`): to look at all of
    them at each call would cost the square of a model's depth.
    """

    def __init__(self, module: nn.Module, subtree: Sequence[nn.Module]) -> None:
        self._module = module
        self._members = {id(each) for each in subtree}
        self._held: dict[int, tuple[nn.Module, str, Any]] = {}
        for each in subtree:
            for name, value in vars(each).items():
                if name not in FRAMEWORK and id(value) not in self._held and _content(value) is not None:
                    self._held[id(value)] = each, name, value
        self.start()

    def start(self) -> None:
        self._touched: dict[int, _Saved] = {}
        self._contents = [(*held, _content(held[2]).copy()) for held in self._held.values()]
        self._generators = _Generators()
        self.add(self._module)

    def add(self, module: nn.Module) -> None:
        """Look at a descendant from now on; other modules are not looked at."""
        if id(module) not in self._touched and id(module) in self._members:
            self._touched[id(module)] = _Saved(module)

    def first_change(self) -> tuple[nn.Module, str] | None:
        """The first module whose state differs by now, and the name of the attribute."""
        for saved in self._touched.values():
            changed = saved.first_change()
            if changed is not None:
                return saved.module, changed
        for module, name, holder, content in self._contents:
            if not _is_same_content(_content(holder), content):
                return module, name
        return None

    def has_drawn(self) -> bool:
        """Whether Python's or numpy's global generator moved."""
        return self._generators.have_moved()


class _Saved:
    """A shallow copy of the __dict__ of a module, of the containers in it and of plain objects."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._entries = dict(vars(module))
        self._contents = [
            (name, value, content.copy())
            for name, value in self._entries.items()
            if (content := _content(value)) is not None
        ]

    def first_change(self) -> str | None:
        """The first attribute that differs by now."""
        now = vars(self.module)
        for name in (*self._entries, *now):
            if name not in now or name not in self._entries or not _is_same(now[name], self._entries[name]):
                return name
        for name, holder, saved in self._contents:
            if not _is_same_content(_content(holder), saved):
                return name
        return None

    def restore(self) -> None:
        for _, holder, saved in self._contents:
            if not _is_same_content(_content(holder), saved):
                _refill(holder, saved)
        if not _is_same_content(vars(self.module), self._entries):
            vars(self.module).clear()
            vars(self.module).update(self._entries)


class _Generators:
    """The states of Python's and numpy's global random generators."""

    def __init__(self) -> None:
        self._random = random.getstate()
        self._numpy = np.random.get_state(legacy=True)

    def have_moved(self) -> bool:
        return random.getstate() != self._random or _position(np.random.get_state(legacy=True)) != _position(
            self._numpy
        )

    def restore(self) -> None:
        random.setstate(self._random)
        np.random.set_state(self._numpy)


class Bystanders:
    """Everything of a model and of the process that a live forward may change.

    Buffers and arguments are copied up front (kernels write them unseen); a parameter only when `before_write` sees the
    first operation that writes to its storage, since copying all of them would double the memory of the model.
    """

    def __init__(self, model: nn.Module, arguments: Sequence[object]) -> None:
        self._python = PythonState(list(model.modules()))
        tensors = [*model.buffers(), *(leaf for leaf in arguments if isinstance(leaf, Tensor))]
        self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]
        self._grads = [(parameter, parameter.grad) for parameter in model.parameters()]
        self._by_storage: dict[int | None, Tensor] = {
            key: tensor for tensor in model.parameters() if (key := _storage(tensor)) is not None
        }
        self._rng = torch.get_rng_state()
        self._cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def before_write(self, tensors: Sequence[object]) -> None:
        """Copy those parameters that share a storage with `tensors`, once."""
        for tensor in tensors:
            key = _storage(tensor) if isinstance(tensor, Tensor) else None
            if key in self._by_storage:
                owner = self._by_storage.pop(key)
                self._copies.append((owner, owner.detach().clone()))

    def restore(self) -> None:
        self._python.restore()
        with torch.no_grad():
            for tensor, saved in self._copies:
                # only if it changed: a write would invalidate what an autograd graph of the caller saved
                if not torch.equal(tensor, saved):
                    tensor.copy_(saved)
        for parameter, grad in self._grads:
            if parameter.grad is not grad:
                parameter.grad = grad
        torch.set_rng_state(self._rng)
        if self._cuda_rng is not None:
            torch.cuda.set_rng_state_all(self._cuda_rng)
        if torch.is_autocast_enabled():
            torch.clear_autocast_cache()


@contextmanager
def restored(model: nn.Module, arguments: Sequence[object]) -> Iterator[Bystanders]:
    """Run a block and put the bystanders and grad mode back, whether or not it raised."""
    grad_enabled = torch.is_grad_enabled()
    bystanders = Bystanders(model, arguments)
    try:
        yield bystanders
    finally:
        torch.set_grad_enabled(grad_enabled)
        bystanders.restore()


def _position(state: Any) -> tuple[Any, ...]:
    return tuple(part.tobytes() if isinstance(part, np.ndarray) else part for part in state)


def held_objects(module: nn.Module) -> dict[str, Any]:
    """The plain objects (configurations) among the attributes of a module."""
    held = {name: value for name, value in vars(module).items() if not isinstance(value, (dict, list, set))}
    return {name: value for name, value in held.items() if _content(value) is not None}


def _content(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN_KINDS:
        return None
    if kind in _CONTAINERS or isinstance(value, (dict, list, set)):
        return value
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value) or kind.__module__.startswith("torch."):
        return None
    return getattr(value, "__dict__", None)


def _refill(holder: Any, saved: Any) -> None:
    if isinstance(holder, list):
        holder[:] = saved
        return
    target = holder if isinstance(holder, (dict, set)) else vars(holder)
    target.clear()
    target.update(saved)


def _is_same_content(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(before, dict):
        return all(key in now and _is_same(now[key], value) for key, value in before.items())
    if isinstance(before, set):
        return bool(now == before)
    return all(_is_same(left, right) for left, right in zip(now, before))


def _is_same(now: object, before: object) -> bool:
    return now is before or (type(now) is type(before) and is_plain(now) and now == before)


def _storage(tensor: Tensor) -> int | None:
    """Address of the storage in bytes; None where there is none to write to."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


FRAMEWORK = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

_CONTAINERS = frozenset({dict, list, set})

_PLAIN_KINDS = frozenset({type(None), bool, int, float, str, tuple})
