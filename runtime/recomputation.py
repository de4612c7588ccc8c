"""Recomputation: what activation checkpointing runs again is given what it was given the first time.

    remembered(key, make)     make(), kept by every checkpoint that is being run, the n-th time by the n-th call
                              where a checkpoint computes again: what the n-th call of `key` was given in it

Both kinds are told from outside. A checkpoint of saved tensors' hooks (torch's non-reentrant one) lies on the stack of
such hooks, in its forward and as it recomputes. One that is an autograd.Function (torch's reentrant one, DeepSpeed's,
one's own) runs the model in its `forward`, without gradients, and again in its `backward`, with the same ctx.
"""

import inspect
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import FrameType, FunctionType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

T = TypeVar("T")


@dataclass
class _Given:
    """What the calls inside of one checkpoint were given, by key and in order, and how many of them ran again."""

    values: dict[Hashable, list[Any]] = field(default_factory=dict)
    run: object = None
    num_replayed: dict[Hashable, int] = field(default_factory=dict)

    def replay(self, key: Hashable, run: object) -> Any:
        """The value of the next call of `key` in this run of the recomputation; None if the first time had none."""
        if run != self.run:
            self.run, self.num_replayed = run, {}
        values, number = self.values.get(key, ()), self.num_replayed.get(key, 0)
        self.num_replayed[key] = number + 1
        return values[number] if number < len(values) else None


def remembered(key: Hashable, make: Callable[[], T]) -> T:
    """make(), or where a checkpoint recomputes, what this call was given the first time. Not None."""
    hooks_seen = _top_hooks(True) is not None
    if torch.is_grad_enabled() and not hooks_seen and torch._C._current_graph_task_id() == -1:
        return make()
    running, again, run = _checkpoints_of_hooks() if hooks_seen else ([], None, None)
    functions, function_again = _checkpoints_of_functions()
    if again is None and function_again is not None:
        again, run = function_again, torch._C._current_graph_task_id()
    given = _CHECKPOINTS.get(again) if again is not None else None
    value = given.replay(key, run) if given is not None else None
    if value is None:
        value = make()
    for checkpoint in (*running, *functions):
        _CHECKPOINTS.setdefault(checkpoint, _Given()).values.setdefault(key, []).append(value)
    return value


def is_recomputing() -> bool:
    """Whether a backward runs on this thread: what calls a module then recomputes."""
    return torch._C._current_graph_task_id() != -1


def is_learning() -> bool:
    """Whether what runs is the forward of something that is differentiated, for the first time: gradients are recorded,
    or a checkpoint that is an autograd.Function runs it without them, to run it again.
    """
    if is_recomputing():
        return False
    if torch.is_grad_enabled():
        return True
    running, _ = _checkpoints_of_functions()
    return any(any(getattr(ctx, "needs_input_grad", ())) for ctx in running)


def _checkpoints_of_hooks() -> tuple[list[object], object, object]:
    """Checkpoints that are run, inside of the one that recomputes; that one, and what tells this run of it."""
    running: list[object] = []
    for pack in _pack_hooks():
        inner: Any = inspect.unwrap(pack)
        if not isinstance(inner, FunctionType) or inner.__module__ != "torch.utils.checkpoint":
            continue
        names = dict(zip(inner.__code__.co_freevars, inner.__closure__ or ()))
        if "target_frame_ref" in names:
            return running, names["target_frame_ref"].cell_contents(), names["gid"].cell_contents
        if "frame" in names:
            running.append(names["frame"].cell_contents)
    return running, None, None


def _pack_hooks() -> Iterator[Any]:
    """Of the hooks for saved tensors, innermost first. Torch shows the last one only, so they are taken off and laid
    on again.
    """
    hooks = []
    while (top := _top_hooks(True)) is not None:
        hooks.append(top)
        _autograd._pop_saved_tensors_default_hooks()
    for pair in reversed(hooks):
        _autograd._push_saved_tensors_default_hooks(*pair)
    return iter([pack for pack, _ in hooks])


def _checkpoints_of_functions() -> tuple[list[object], object]:
    """The ctx of each autograd.Function whose forward runs on this stack, up to one whose backward does; its ctx."""
    running: list[object] = []
    frame: FrameType | None = sys._getframe(2)
    inner = frame
    while frame is not None and inner is not None:
        if frame.f_code is _FORWARD:
            ctx = _first_argument(inner)
            if isinstance(ctx, torch.autograd.function.FunctionCtx):
                running.append(ctx)
        elif frame.f_code is _BACKWARD:
            return running, frame.f_locals["self"]
        frame, inner = frame.f_back, frame
    return running, None


def _first_argument(frame: FrameType) -> object:
    code = frame.f_code
    if code.co_argcount:
        return frame.f_locals.get(code.co_varnames[0])
    if code.co_flags & inspect.CO_VARARGS:
        positional = frame.f_locals.get(code.co_varnames[code.co_kwonlyargcount], ())
        return positional[0] if positional else None
    return None


_autograd: Any = vars(torch._C)["_autograd"]
_top_hooks = _autograd._top_saved_tensors_default_hooks
_FORWARD = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__
_CHECKPOINTS: WeakKeyDictionary[Any, _Given] = WeakKeyDictionary()
"""By the object that a checkpoint lives in: torch's frame, or the ctx of a function."""
