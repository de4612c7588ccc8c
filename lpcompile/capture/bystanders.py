"""Bystanders: what a recording must leave as it found it, and what a forward changed on the Python side.

A live forward draws random numbers, moves batch-norm statistics and may write attributes. `Bystanders` puts all of it
back; `PythonState` tells which module attributes changed between two points of a forward.
"""

import collections
import copy
import pickle
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lpcompile.capture.guards import is_plain
from lpcompile.capture.looks import PLAIN, holders, is_object, moves
from lpcompile.capture.outside import Named


class PythonState:
    """A shallow copy of the __dict__ of modules and of whatever can be reached from it: containers, plain objects
    (configurations) and random generators. Of names outside (globals) the values and what can be reached from them."""

    def __init__(self, modules: Sequence[nn.Module], named: Iterable[Named] = ()) -> None:
        self._saved = [_Saved(module) for module in modules]
        self._named = [(each, each.value()) for each in named]
        reached = {id(held): held for module in modules for _, held in Held.of(module)}
        reached.update((id(held), held) for _, value in self._named for held in holders(value))
        self._contents = [(held, _snapshot(held)) for held in reached.values()]
        self._generators = _Generators()

    def restore(self) -> None:
        for held, content in self._contents:
            if not _is_same_content(_snapshot(held), content):
                _refill(held, content)
        for saved in self._saved:
            saved.restore()
        for each, value in self._named:
            if each.value() is not value:
                each.space.put(each.name, value)
        self._generators.restore()


class Held:
    """What can be reached from the attributes of modules, looked up once per value."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, list[Any]]] = {}

    @staticmethod
    def of(module: nn.Module, known: "Held | None" = None) -> Iterator[tuple[str, Any]]:
        """(attribute, holder) of the containers, plain objects and generators."""
        found = Held()._found if known is None else known._found
        for name, value in vars(module).items():
            if name in FRAMEWORK or type(value) in PLAIN:
                continue
            if id(value) not in found:
                found[id(value)] = value, holders(value)
            for held in found[id(value)][1]:
                yield name, held


class Watch:
    """What a forward changes on the Python side between two of its calls of children.

    Looked at are the module itself, whatever user's container or configuration it or a descendant holds, what the
    forward names outside (`add_named`), and each descendant from the moment that the forward first reads or writes one
    of its attributes (`add`): to look at all of them at each call would cost the square of a model's depth.
    """

    def __init__(self, module: nn.Module, subtree: Sequence[nn.Module], known: Held | None = None) -> None:
        self._module = module
        self._members = {id(each) for each in subtree}
        self._held: dict[int, tuple[nn.Module | None, str, Any]] = {}
        self._named: dict[Named, Any] = {}
        for each in subtree:
            for name, held in Held.of(each, known):
                self._held.setdefault(id(held), (each, name, held))
        self.start()

    def start(self) -> None:
        self._touched: dict[int, _Saved] = {}
        self._contents = [(*held, _snapshot(held[2])) for held in self._held.values()]
        self._named = {named: named.value() for named in self._named}
        self._generators = _Generators()
        self.add(self._module)

    def add(self, module: nn.Module) -> None:
        """Look at a descendant from now on; other modules are not looked at."""
        if id(module) not in self._touched and id(module) in self._members:
            self._touched[id(module)] = _Saved(module)

    def add_named(self, named: Named, value: Any) -> None:
        """Look at a name outside from now on."""
        if named in self._named:
            return
        self._named[named] = value
        for held in holders(value):
            if id(held) not in self._held:
                self._held[id(held)] = None, str(named), held
                self._contents.append((None, str(named), held, _snapshot(held)))

    def first_change(self) -> tuple[nn.Module | None, str] | None:
        """The first module whose state differs by now, and the name of the attribute; or no module and a name
        outside."""
        for saved in self._touched.values():
            changed = saved.first_change()
            if changed is not None:
                return saved.module, changed
        for module, name, held, content in self._contents:
            if not _is_same_content(_snapshot(held), content):
                return module, name
        for named, value in self._named.items():
            if not _is_same(named.value(), value):
                return None, str(named)
        return None

    def has_drawn(self) -> bool:
        """Whether Python's or numpy's global generator moved."""
        return self._generators.have_moved()


class _Saved:
    """A shallow copy of the __dict__ of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._entries = dict(vars(module))
        self._contents = [(name, value, value.copy()) for name, value in self._entries.items() if type(value) in _OWN]
        self._iterators = [
            (name, copied) for name, value in self._entries.items() if (copied := _copied_iterator(value))
        ]

    def first_change(self) -> str | None:
        """The first attribute that differs by now."""
        now = vars(self.module)
        for name in (*self._entries, *now):
            if name not in now or name not in self._entries or not _is_same(now[name], self._entries[name]):
                return name
        for name, holder, saved in self._contents:
            if not _is_same_content(holder, saved):
                return name
        return None

    def restore(self) -> None:
        for _, holder, saved in self._contents:
            if not _is_same_content(holder, saved):
                _refill(holder, saved)
        for name, (iterator, state) in self._iterators:
            if iterator.__reduce__() != state.__reduce__():
                self._entries[name] = state
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

    def __init__(self, model: nn.Module, arguments: Sequence[object], named: Iterable[Named] = ()) -> None:
        self._python = PythonState(list(model.modules()), named)
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
def restored(model: nn.Module, arguments: Sequence[object], named: Iterable[Named] = ()) -> Iterator[Bystanders]:
    """Run a block and put the bystanders and grad mode back, whether or not it raised."""
    grad_enabled = torch.is_grad_enabled()
    bystanders = Bystanders(model, arguments, named)
    try:
        yield bystanders
    finally:
        torch.set_grad_enabled(grad_enabled)
        bystanders.restore()


def _position(state: Any) -> tuple[Any, ...]:
    return tuple(part.tobytes() if isinstance(part, np.ndarray) else part for part in state)


def held_objects(module: nn.Module) -> dict[str, Any]:
    """The plain objects (configurations) among the attributes of a module and of such objects, by dotted path."""
    found: dict[str, Any] = {}

    def visit(owner: Any, prefix: str, depth: int) -> None:
        for name, value in vars(owner).items():
            if type(value) in PLAIN or type(value) in _OWN or isinstance(value, (dict, list, set)):
                continue
            if is_object(value) and not callable(value) and not moves(value) and (prefix or name not in FRAMEWORK):
                found[prefix + name] = value
                if depth:
                    visit(value, f"{prefix}{name}.", depth - 1)

    visit(module, "", 2)
    return found


class _State:
    """The state of a random generator; equal by its bytes."""

    def __init__(self, value: Any, content: bytes | None = None) -> None:
        self.value = value
        self.content = pickle.dumps(value) if content is None else content


def _snapshot(held: Any) -> Any:
    """A shallow copy of what a holder holds, or the state of a generator."""
    if isinstance(held, dict):
        return dict(held)
    if isinstance(held, (list, collections.deque)):
        return list(held)
    if isinstance(held, set):
        return set(held)
    if isinstance(held, torch.Generator):
        return _State(held.get_state(), held.get_state().numpy().tobytes())
    if isinstance(held, np.random.Generator):
        return _State(held.bit_generator.state)
    if isinstance(held, random.Random):
        return _State(held.getstate())
    if isinstance(held, np.random.RandomState):
        return _State(held.get_state(legacy=True))
    return dict(vars(held)) if is_object(held) and not moves(held) else []


def _refill(held: Any, content: Any) -> None:
    if isinstance(held, list):
        held[:] = content
    elif isinstance(held, collections.deque):
        held.clear()
        held.extend(content)
    elif isinstance(held, (torch.Generator, np.random.RandomState)):
        held.set_state(content.value)
    elif isinstance(held, random.Random):
        held.setstate(content.value)
    elif isinstance(held, np.random.Generator):
        held.bit_generator.state = content.value
    else:
        target = held if isinstance(held, (dict, set)) else vars(held)
        target.clear()
        target.update(content)


def _copied_iterator(value: Any) -> tuple[Any, Any] | None:
    """An iterator and its copy, where there can be one."""
    if not hasattr(type(value), "__next__") or isinstance(value, nn.Module):
        return None
    try:
        return value, copy.copy(value)
    except TypeError:
        return None


def _is_same_content(now: Any, before: Any) -> bool:
    if isinstance(before, _State):
        return bool(now.content == before.content)
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

_OWN = frozenset({dict, list, set, collections.OrderedDict})
