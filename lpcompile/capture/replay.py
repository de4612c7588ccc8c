"""Replay: a forward runs a second time, on plain numbers, and must do what was recorded.

    recorded   s = x.shape[0]  ->  a torch.SymInt      isinstance(s, int)  ->  no:   sub(...)
    replayed   s = x.shape[0]  ->  4                   isinstance(s, int)  ->  yes:  add(...)    not the same

A recording changes what a forward can see: sizes are symbols, and a tensor that an operation hands through is an alias
of itself. The replay shows the forward what a real call shows it. Nothing is computed: each operation and each child is
compared with the next of the tape, and gives what it gave. What comes out otherwise because of a clock, a random
generator or an iterator is found on the way.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lpcompile.capture.guards import is_plain
from lpcompile.capture.shapes import concrete


class Diverged(BaseException):
    """The forward does something else than what is on the tape. No Exception, so that a forward cannot catch it."""


@dataclass(frozen=True, slots=True)
class Event:
    """One operation or call of a child, with its operands, and what it gave or raised."""

    target: Any
    operands: Any
    result: Any
    error: Exception | None


@dataclass
class Tape:
    """What a forward did, in order."""

    events: list[Event] = field(default_factory=list)
    aliases: dict[int, int] = field(default_factory=dict)
    """Id of an alias that the recorder made -> id of the tensor that a real call has in its place."""

    def add(
        self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, error: Exception | None
    ) -> None:
        self.events.append(Event(target, _copied((tuple(args), dict(kwargs))), copied(result), error))

    def add_alias(self, alias: Tensor, tensor: Tensor) -> None:
        self.aliases[id(alias)] = self.aliases.get(id(tensor), id(tensor))

    @property
    def copies_by_layout(self) -> bool:
        """Whether an operation gives its argument itself or a copy, depending on strides that no guard may hold."""
        return any(_is_contiguous(event) for event in self.events)


class Replay:
    """One run of a forward against a tape. `swaps_copies`: what may be a copy or the tensor itself, is the other."""

    def __init__(self, tape: Tape, *, swaps_copies: bool = False) -> None:
        self._events: Iterator[Event] = iter(tape.events)
        self._aliases = dict(tape.aliases)
        self._kept: list[Tensor] = []  # alive, so that no id is used twice
        self._swaps_copies = swaps_copies
        for event in tape.events if swaps_copies else ():
            if _is_contiguous(event) and isinstance(event.result, Tensor):
                (tensor, *_), _ = event.operands
                self._aliases[id(event.result)] = self._name(tensor)

    def take(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the next event gave, if it is this one."""
        event = next(self._events, None)
        if event is None or event.target != target or not self._is_same(event.operands, (tuple(args), dict(kwargs))):
            raise Diverged
        if event.error is not None:
            raise event.error
        if target is torch._C._set_grad_enabled:
            return target(*args)
        if self._swaps_copies and _is_contiguous(event):
            if event.result is not args[0]:
                return args[0]
            copy = args[0].view_as(args[0])
            self._aliases[id(copy)] = self._name(args[0])
            self._kept.append(copy)
            return copy
        return event.result if isinstance(event.result, Tensor) else concrete(copied(event.result))

    def finish(self, recorded: Any, replayed: Any) -> None:
        """The forward returned `replayed`, and what it had returned when it was recorded is `recorded`."""
        if next(self._events, None) is not None:
            raise Diverged
        (before, structure), (after, other) = _flat(recorded), _flat(replayed)
        if structure != other or not self._is_same(tuple(before), tuple(after)):
            raise Diverged

    def _name(self, tensor: Tensor) -> int:
        return self._aliases.get(id(tensor), id(tensor))

    def _is_same(self, then: Any, now: Any) -> bool:
        if isinstance(now, Tensor):
            return isinstance(then, Tensor) and self._name(then) == self._name(now)
        if isinstance(now, (tuple, list)):
            return (
                isinstance(then, tuple)
                and len(then) == len(now)
                and all(self._is_same(*pair) for pair in zip(then, now))
            )
        if isinstance(now, Mapping):
            return (
                isinstance(then, Mapping)
                and list(then) == list(now)
                and all(self._is_same(then[key], item) for key, item in now.items())
            )
        then = concrete(then)
        if type(then) is not type(now):
            return False
        if type(now) is slice:
            return all(self._is_same(getattr(then, part), getattr(now, part)) for part in ("start", "stop", "step"))
        if now is then or not is_plain(now):
            return True  # what is not plain, no graph takes
        return bool(now == then or now != now) and repr(now) == repr(then)  # repr: 0.0 is not -0.0


def _is_contiguous(event: Event) -> bool:
    return getattr(event.target, "__name__", "") == "contiguous"


def _flat(result: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(result, is_leaf=lambda value: not isinstance(value, (tuple, list, dict)))


def copied(value: Any) -> Any:
    """A copy of nested containers, which nobody else can change."""
    return _copied(value, as_is=True)


def _copied(value: Any, *, as_is: bool = False) -> Any:
    """A copy of nested containers, which nobody else can change; tuples for lists, unless `as_is`."""
    if isinstance(value, (Tensor, nn.Module)):
        return value
    if type(value) in (tuple, list):
        items = [_copied(item, as_is=as_is) for item in value]
        return items if as_is and type(value) is list else tuple(items)
    if type(value) is torch.Size and not as_is:
        return tuple(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [_copied(item, as_is=as_is) for item in value]
        return type(value)(*items) if as_is else tuple(items)
    if type(value) is dict:
        return {key: _copied(item, as_is=as_is) for key, item in value.items()}
    return value
