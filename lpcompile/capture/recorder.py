"""Recorder: from one live forward of a model to one graph per module that the forward calls.

    model(*args, **kwargs)   ->   "":        input_ids -> call_module transformer -> call_module lm_head -> output
                                  "h.0":     x -> call_module ln_1 -> call_module attn -> add -> output
                                  "h.0.attn": x -> call_module c_attn -> split -> view -> matmul -> softmax -> output

The forward runs on the tensors it is given, in the mode the model is in, and leaves no trace; the sizes it reads are
symbols (shapes.py). On the meta device nothing is computed; a truth value that it asks of a tensor is False, and other
data are ones. Children stay calls of the child, so weights, hooks and wrappers stay where they are. A module whose
forward a graph cannot stand for is named with the reason and the line.
"""

import sys
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules import container, transformer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lpcompile.capture.bystanders import Bystanders, Held, held_objects, restored
from lpcompile.capture.frame import CHECKPOINT_FLAG, Frame, FunctionCall, is_checkpoint_flag, is_watchable
from lpcompile.capture.guards import flatten_arguments, with_article
from lpcompile.capture.outside import Named, Outside
from lpcompile.capture.precedents import Precedents
from lpcompile.capture.recording import Opaque, Recording, RecordResult
from lpcompile.capture.replay import Diverged, Replay
from lpcompile.capture.script import look_outside
from lpcompile.capture.shapes import Shapes, concrete
from lpcompile.frontends.install import original_forward


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_leaf: Callable[[nn.Module], bool],
    precedents: Precedents | None = None,
) -> RecordResult:
    """Run `model(*args, **kwargs)` once, in the caller's grad mode, and record the forward of every module it calls.

    Leaves are kept as one call and not entered: what `is_leaf` names, and torch's own layers. Modules that do the same
    share one graph, also with an earlier recording that was given the same `precedents`.
    """
    precedents = Precedents() if precedents is None else precedents
    leaves, _ = flatten_arguments(args, kwargs)

    def run(plain: Container[str]) -> _Recorder:
        outside = Outside()
        with restored(model, leaves, _named(model, is_leaf, outside)) as bystanders:
            recorder = _Recorder(model, is_leaf, bystanders, plain, precedents, outside)
            with recorder.listening():
                model(*args, **kwargs)
        return recorder

    try:
        recorder = run(())
        plain: frozenset[str] = frozenset()
        for _ in range(MAX_RERUNS):
            if recorder.tell_symbols <= plain:
                break
            plain |= recorder.tell_symbols
            recorder = run(plain)
    except Exception:
        # a forward that cannot bear a torch.SymInt for a size; if it is not that, the same error comes again
        recorder = run({path for path, _ in model.named_modules()})
    return recorder.result()


def is_builtin_leaf(module: nn.Module) -> bool:
    """torch's own layers, except those that only hold and call other layers, and whatever another compiler owns."""
    if isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
        return True
    owner = type(module).__module__
    return owner.startswith("torch.nn.modules.") and owner not in (container.__name__, transformer.__name__)


def _named(model: nn.Module, is_leaf: Callable[[nn.Module], bool], outside: Outside) -> list[Named]:
    """What the forwards of a model, and the functions that its modules hold, name outside."""
    found: dict[Named, None] = {}
    for module in model.modules():
        if is_builtin_leaf(module) or is_leaf(module):
            continue
        held = (value for value in vars(module).values() if isinstance(value, (FunctionType, MethodType)))
        for function in (original_forward(module), *held):
            found.update(outside.reads(function, type(module)).named)
    return list(found)


class _Recorder:
    """The stack of frames of the running forward, and what the finished ones gave."""

    def __init__(
        self,
        model: nn.Module,
        is_leaf: Callable[[nn.Module], bool],
        bystanders: Bystanders,
        plain: Container[str],
        precedents: Precedents,
        outside: Outside,
    ) -> None:
        """`plain` are the paths of modules whose sizes are plain numbers."""
        self.tell_symbols: set[str] = set()
        """Paths of modules whose forward does something else where sizes are plain numbers."""
        self._replay: Replay | None = None
        self._outside = outside
        self._held = Held()
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._modules = list(model.modules())
        self._is_leaf = is_leaf
        self._bystanders = bystanders
        self._plain = plain
        self._precedents = precedents
        self._signatures = precedents.signatures(model)
        self._stack: list[Frame] = []
        self._suspended = False
        self._thread = threading.get_ident()
        self._recordings: dict[str, list[Recording]] = {}
        self._opaque: dict[str, Opaque] = {}
        self._reached: set[str] = set()

    def result(self) -> RecordResult:
        """In the order of registration, the model first."""
        paths = list(self._paths.values())
        return RecordResult(
            {path: self._recordings[path] for path in paths if path in self._recordings and path not in self._opaque},
            {path: self._opaque[path] for path in paths if path in self._opaque},
            frozenset(self._reached),
        )

    # -- listening ---------------------------------------------------------------------------------------------------

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Everything that goes through torch's functions, module calls and autograd.Function arrives here."""
        function = torch.autograd.Function
        original_apply = function.__dict__["apply"]
        original_call = nn.Module.__call__
        original_setattr = nn.Module.__setattr__
        original_unwrap = torch._functorch.utils.unwrap_dead_wrappers
        original_checkpoint = torch.utils.checkpoint._checkpoint_without_reentrant_generator
        original_is_grad_enabled = torch.is_grad_enabled
        original_is_inference_mode_enabled = torch.is_inference_mode_enabled
        original_repr = torch.SymInt.__repr__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(module) in self._paths:
                self._reached.add(self._paths[id(module)])
                if self._replay is not None and self._is_mine():
                    return self._replay.take(self._paths[id(module)], args, kwargs)
            if not self._is_listening():
                return original_call(module, *args, **kwargs)
            return self._on_call(original_call, module, args, kwargs)

        def set_attribute(module: nn.Module, name: str, value: Any) -> None:
            frame = self._frame
            if frame is not None:
                with self._suspend():
                    frame.touch(module)
                    frame.note_write(module, name)
            original_setattr(module, name, value)

        def watched(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
            def get_attribute(owner: Any, name: str) -> Any:
                value = original(owner, name)
                if not self._stack or self._suspended:  # most reads: torch's own
                    return value
                frame = self._frame
                # what a property computes shows in the attributes it reads
                if frame is not None and (
                    name == "__dict__"
                    or name in object.__getattribute__(owner, "__dict__")
                    or _is_users(type(owner), name)
                ):
                    self._suspended = True
                    try:
                        frame.note_read(owner, name, value)
                    finally:
                        self._suspended = False
                return value

            return get_attribute

        def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            run = original_apply.__get__(None, cls)
            if self._replay is not None and self._is_mine():
                return self._replay.take(FunctionCall(cls), args, kwargs)
            return self._on_function(run, cls, args, kwargs) if self._frame is not None else run(*args, **kwargs)

        def unwrap(args: tuple[Any, ...]) -> tuple[Any, ...]:
            # only a method bound before recording began gets here: the recorder's own apply suspends
            if self._frame is not None:
                self._frame.fail("calls the apply of an autograd.Function that was bound before recording began")
            return original_unwrap(args)

        def checkpoint(*args: Any, **kwargs: Any) -> Any:
            if self._frame is not None:
                self._frame.fail("checkpoints a part of itself, which a graph would not recompute")
            return original_checkpoint(*args, **kwargs)

        def print_size(size: torch.SymInt) -> str:
            # a name as good as a number in text: what is made of the text, no condition says
            return original_repr(size) if self._frame is None else repr(int(size))

        def is_inference_mode_enabled() -> bool:
            if self._frame is not None:
                self._frame.reads_inference_mode = True
            return original_is_inference_mode_enabled()

        def is_grad_enabled() -> bool:
            if self._frame is not None:
                self._frame.reads_grad_mode = True
            return original_is_grad_enabled()

        with ExitStack() as stack:
            stack.enter_context(_patched(nn.Module, "__call__", call))
            stack.enter_context(_patched(nn.Module, "__setattr__", set_attribute))
            for cls in (nn.Module, *self._held_classes()):
                reads: Any = cls.__getattribute__
                stack.enter_context(_patched(cls, "__getattribute__", watched(reads)))
            stack.enter_context(_patched(function, "apply", classmethod(apply)))
            stack.enter_context(_patched(torch._functorch.utils, "unwrap_dead_wrappers", unwrap))
            stack.enter_context(_patched(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", checkpoint))
            stack.enter_context(_patched(torch, "is_grad_enabled", is_grad_enabled))
            stack.enter_context(_patched(torch._C, "is_grad_enabled", is_grad_enabled))
            stack.enter_context(_patched(torch, "is_inference_mode_enabled", is_inference_mode_enabled))
            stack.enter_context(_patched(torch.SymInt, "__repr__", print_size))
            for name in _OVERRIDE_QUESTIONS:
                answer = self._without_recorder(getattr(torch.overrides, name))
                stack.enter_context(_patched(torch.overrides, name, answer))
            stack.enter_context(self._checkpoint_flags_off())
            stack.enter_context(_Operations(self))
            yield

    def _held_classes(self) -> list[type]:
        """Classes of the configurations that modules hold."""
        classes = {type(held) for module in self._modules for held in held_objects(module).values()}
        return [cls for cls in classes if is_watchable(cls)]

    @contextmanager
    def _checkpoint_flags_off(self) -> Iterator[None]:
        """A class that wraps its forward in a checkpoint wraps the generated one as well: record what is inside."""
        flagged = [m for m in self._modules if is_checkpoint_flag(m, CHECKPOINT_FLAG) and vars(m).get(CHECKPOINT_FLAG)]
        for module in flagged:
            vars(module)[CHECKPOINT_FLAG] = False
        try:
            yield
        finally:
            for module in flagged:
                vars(module)[CHECKPOINT_FLAG] = True

    @contextmanager
    def _suspend(self, value: bool = True) -> Iterator[None]:
        before, self._suspended = self._suspended, value
        try:
            yield
        finally:
            self._suspended = before

    def _is_listening(self) -> bool:
        return not self._suspended and threading.get_ident() == self._thread

    def _is_mine(self) -> bool:
        return threading.get_ident() == self._thread

    def _without_recorder(self, question: Callable[..., bool]) -> Callable[..., bool]:
        """torch.overrides.has_torch_function as it answers where nothing is recorded; torch's own layers ask whether
        anything sees their operations, and something does."""

        def answer(*args: Any) -> bool:
            is_user = not sys._getframe(1).f_globals.get("__name__", "").startswith("torch.")
            if not self._is_mine() or not is_user or (self._frame is None and self._replay is None):
                return question(*args)
            values = args[0] if question.__name__ == "has_torch_function" else args
            return any(
                type(value) is not Tensor and getattr(value, "__torch_function__", _NO_OVERRIDE) is not _NO_OVERRIDE
                for value in values
            )

        return answer

    @property
    def _frame(self) -> Frame | None:
        """The frame that is recording now."""
        return self._stack[-1] if self._stack and self._is_listening() else None

    @property
    def _shapes(self) -> Shapes | None:
        """The sizes in the running call, its hooks and leaves included."""
        return self._stack[-1].shapes if self._stack and threading.get_ident() == self._thread else None

    # -- modules -----------------------------------------------------------------------------------------------------

    def _on_call(
        self, original_call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        caller = self._frame
        if caller is None:
            return self._call(original_call, module, args, kwargs)[0]
        if id(module) not in self._paths:
            # a loss or an activation made on the way: its operations are the caller's
            return original_call(module, *args, **kwargs)
        with self._suspend(), torch._C.DisableTorchFunction():
            caller.pause()
            path = caller.child_path(module)
            if path is None:
                caller.fail(f"calls a {type(module).__name__} that is not one of its children")
            before = flatten_arguments(args, kwargs)
            node = caller.prepare("call_module", path or "", args, kwargs)
        result, has_raised_sizes = self._call(original_call, module, args, kwargs)
        after = flatten_arguments(args, kwargs)
        if before[1] != after[1] or any(now is not then for now, then in zip(after[0], before[0])):
            caller.fail(f"hands {path} a container that {path} writes to")
        with self._suspend(), torch._C.DisableTorchFunction():
            caller.note_event(self._paths[id(module)], args, kwargs, result)
            result = caller.bind(node, path, result)
            caller.resume()
        if caller.shapes is not None and not has_raised_sizes:
            # a leaf that torch's functions do not show (TorchScript): nothing says what it makes of sizes
            with torch._C.DisableTorchFunction():
                if any(caller.shapes.shadow(leaf) is None for leaf in pytree.tree_leaves(result) if _is_tensor(leaf)):
                    caller.shapes.fix((args, kwargs))
        if has_raised_sizes or caller.is_tainted((args, kwargs)):
            caller.taint(result)
        return result

    def _call(
        self, original_call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        """The result of the call, and whether its sizes depend on data. Hooks run unrecorded: they stay hooks."""
        if is_builtin_leaf(module) or self._is_leaf(module):
            with self._suspend():
                return original_call(module, *args, **kwargs), False
        state = vars(module)
        override = state.get("forward")
        with self._suspend():
            forward = override or original_forward(module)
        unsized = False

        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal unsized
            _put_back(state, override)
            caller = self._stack[-1] if self._stack else None
            path = self._paths[id(module)]
            with torch._C.DisableTorchFunction():
                frame = Frame(
                    module,
                    path,
                    forward,
                    args,
                    kwargs,
                    caller=caller,
                    is_symbolic=path not in self._plain,
                    precedents=self._precedents,
                    signature=self._signatures[id(module)],
                    outside=self._outside,
                    held=self._held,
                )
            if override is not None:
                frame.fail("is replaced on the instance, where the class's forward does not run")
            result = self._run(frame, forward, *frame.arguments)
            self._check(frame, forward, result)
            with torch._C.DisableTorchFunction():
                unsized = frame.returns_tainted(result)
                told = frame.tell_caller(caller, result)
                outcome = frame.finish(result)
                # what an opaque module makes of its sizes, no guard says
                unsized |= isinstance(outcome, Opaque)
                self._keep(frame, outcome)
            return told

        state["forward"] = recorded_forward
        try:
            with self._suspend():
                return original_call(module, *args, **kwargs), unsized
        finally:
            _put_back(state, override)

    def _run(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._stack.append(frame)
        try:
            with self._suspend(False):
                return forward(*args, **kwargs)
        except Exception:
            if len(self._stack) > 1:
                self._stack[-2].fail(f"calls {frame.path}, which raises")
            raise
        finally:
            self._stack.pop()

    def _check(self, frame: Frame, forward: Callable[..., Any], result: Any) -> None:
        """Run the forward again as a real call runs it; a graph may stand for it only if it does the same."""
        with self._suspend(), torch._C.DisableTorchFunction():
            frame.pause()
        if frame.opaque is not None:
            return
        if not self._is_repeated(frame, forward, result, swaps_copies=False):
            if frame.is_symbolic and frame.reads_sizes:
                self.tell_symbols.add(frame.path)
            frame.fail("does not do in a second run what it did in the first", where=frame.definition)
        elif not frame.reads_strides and frame.tape.copies_by_layout:
            frame.reads_strides = not self._is_repeated(frame, forward, result, swaps_copies=True)

    def _is_repeated(self, frame: Frame, forward: Callable[..., Any], result: Any, *, swaps_copies: bool) -> bool:
        args, kwargs = frame.arguments
        grad_enabled = torch.is_grad_enabled()
        self._replay = Replay(frame.tape, swaps_copies=swaps_copies)
        try:
            with self._suspend():
                again = forward(*concrete(args), **concrete(kwargs))
                with torch._C.DisableTorchFunction():
                    self._replay.finish(result, again)
        except (Exception, Diverged):
            return False
        finally:
            self._replay = None
            torch._C._set_grad_enabled(grad_enabled)
        return True

    def _keep(self, frame: Frame, outcome: Recording | Opaque) -> None:
        path = frame.path
        if isinstance(outcome, Opaque):
            self._opaque.setdefault(path, outcome)
            return
        variants = self._recordings.setdefault(path, [])
        twin = next((variant for variant in variants if variant.guard == outcome.guard), None)
        if twin is None:
            variants.append(outcome)
        elif twin.graph is not outcome.graph and str(twin.graph) != str(outcome.graph):
            reason = "runs differently in two calls that no guard can tell apart"
            self._opaque.setdefault(path, Opaque(reason, frame.definition))

    # -- operations --------------------------------------------------------------------------------------------------

    def on_operation(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One torch function that is about to run."""
        if self._replay is not None and self._is_mine():
            is_of_sizes = getattr(func, "__name__", "").startswith("sym_")
            return func(*args, **kwargs) if is_of_sizes else self._replay.take(func, args, kwargs)
        name, target, operands = _normalise(func, args)
        writes = _writes(name, kwargs)
        if writes:
            self._bystanders.before_write([*pytree.tree_leaves(list(args)), kwargs.get("out")])
        if name.startswith("sym_"):
            return func(*args, **kwargs)
        shapes = self._shapes
        if shapes is not None and name in _SIZE_READS - _STRIDE_READS and isinstance(args[0], Tensor):
            if self._frame is not None and self._frame.is_tainted((args, kwargs)):
                self._fail_on_data(self._frame, f"reads {name} of a tensor whose size depends on data")
            elif name in _SYMBOLIC_READS and (shadow := shapes.shadow(args[0])) is not None:
                size = func(shadow, *args[1:], **kwargs)
                if self._frame is not None:
                    self._frame.note_size_read(args[0])
                    self._frame.reads_sizes = True
                    self._frame.note_event(func, args, kwargs, size)
                return int(size) if name == "__len__" else size
            elif name == "nbytes":
                shapes.fix(args)
        frame = self._frame
        given, options = concrete(args), concrete(dict(kwargs))
        written = [leaf for leaf in pytree.tree_leaves(list(args)) if _is_tensor(leaf)] if writes else []
        layouts = [look_outside(tensor) for tensor in written]
        if frame is None:
            result = func(*given, **options)
            if shapes is not None:
                with self._suspend():
                    shapes.follow(func, args, kwargs, result)
                    if layouts != [look_outside(tensor) for tensor in written]:
                        shapes.forbid_following()
            return result
        if func is torch._C._set_grad_enabled:
            frame.switches_grad_mode = True
        with self._suspend():
            frame.note_product(func, args, kwargs)
        tainted = frame.is_tainted((args, kwargs))
        reads = name in _SIZE_READS or name in _STATIC_READS
        with self._suspend():
            node = None if reads else frame.prepare("call_function", target, operands, kwargs)
            try:
                result = func(*given, **options)
            except Exception as error:
                frame.withdraw(node)
                frame.note_event(func, args, kwargs, error=error)
                if name not in _DATA_READS or not args[0].is_meta:
                    raise
                # any answer will do: the frame has no graph now, and what its children record is guarded
                answer = False if name == "__bool__" else func(_ones_like(args[0]), *map(_ones_like, given[1:]))
                taken = repr(answer) if isinstance(answer, (bool, int, float)) else "ones"
                self._fail_on_data(frame, f"depends on data, which meta tensors lack: {name} was taken for {taken}")
                return answer
            if reads:
                frame.reads_strides |= name in _STRIDE_READS
                if name in _SIZE_READS and isinstance(args[0], Tensor):
                    frame.note_size_read(args[0])
                if name in _STATIC_READS and isinstance(args[0], Tensor):
                    frame.note_kind_read(args[0])
                if tainted and name in _SIZE_READS:
                    self._fail_on_data(frame, f"reads {name} of a tensor whose size depends on data")
                frame.note_event(func, args, kwargs, result)
                return result
            if name in _AUTOGRAD_READS:
                frame.fail(f"reads {name} of a tensor, which no guard holds")
            if name in ("__set__", "__delete__"):
                frame.fail(f"assigns to {func.__self__.__name__} of a tensor")
            if not _is_made_of_tensors(result):
                self._fail_on_data(frame, f"depends on data: {name} gives {with_article(result)}")
            if shapes is not None and not _has_sizes_from_data(name, args, kwargs):
                shapes.follow(func, args, kwargs, result)
                if layouts != [look_outside(tensor) for tensor in written]:
                    shapes.forbid_following()
            frame.note_event(func, args, kwargs, result)
            result = frame.bind(node, target, result, writes=writes)
        if tainted or _has_sizes_from_data(name, args, kwargs):
            frame.taint(result)
        return result

    def _fail_on_data(self, frame: Frame, reason: str) -> None:
        frame.reads_data = True
        frame.fail(reason)

    def _on_function(
        self,
        run: Callable[..., Any],
        function: type[torch.autograd.Function],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        frame = self._stack[-1]
        if function is torch.utils.checkpoint.CheckpointFunction:
            frame.fail("checkpoints a part of itself, which a graph would not recompute")
            return run(*args, **kwargs)
        target = FunctionCall(function)
        with self._suspend(), torch._C.DisableTorchFunction():
            node = frame.prepare("call_function", target, args, kwargs)
        with self._suspend():
            result = run(*concrete(args), **concrete(kwargs))
        with self._suspend(), torch._C.DisableTorchFunction():
            if frame.shapes is not None and any(
                frame.shapes.shadow(leaf) is None for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)
            ):
                frame.shapes.fix((args, kwargs))
            frame.note_event(target, args, kwargs, result)
            result = frame.bind(node, target, result, writes=True)
        if frame.is_tainted((args, kwargs)):
            frame.taint(result)
        return result


class _Operations(TorchFunctionMode):
    """Hands each torch function to the recorder."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._recorder.on_operation(func, args, kwargs or {})


def _is_users(cls: type, name: str) -> bool:
    """Whether the class has a value or a method of this name that a user wrote; what a property computes shows in what
    it reads."""
    if name == "forward" or name.startswith("__"):
        return False
    for base in cls.__mro__:
        if name in vars(base):
            value = vars(base)[name]
            is_method = isinstance(value, (FunctionType, classmethod, staticmethod))
            return not base.__module__.startswith("torch.") and (is_method or not hasattr(type(value), "__get__"))
    return False


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _put_back(state: dict[str, Any], override: Any) -> None:
    if override is not None:
        state["forward"] = override
    else:
        state.pop("forward", None)


def _normalise(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """(name, target, operands): a property getter becomes getattr, which has a source text."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        attribute = func.__self__.__name__
        return attribute, getattr, (args[0], attribute)
    return name, func, args


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _ones_like(value: Any) -> Any:
    return torch.ones(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _writes(name: str, options: Mapping[str, Any]) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITERS or bool(options.get("inplace")) or options.get("out") is not None


def _is_made_of_tensors(result: Any) -> bool:
    if result is None or isinstance(result, Tensor):
        return True
    if isinstance(result, (tuple, list)) and not isinstance(result, torch.Size):
        return all(_is_made_of_tensors(item) for item in result)
    return False


def _has_sizes_from_data(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if name in _SIZED_BY_DATA:
        return True
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "repeat_interleave":
        return any(isinstance(arg, Tensor) for arg in args[1:]) and kwargs.get("output_size") is None
    if name == "__getitem__":
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in pytree.tree_leaves(args[1:]))
    return False


MAX_RERUNS = 2
"""Of a whole forward, in which more and more modules are shown plain numbers."""

_OVERRIDE_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")

_NO_OVERRIDE = torch._C._disabled_torch_function_impl

_STRIDE_READS = frozenset({"stride", "is_contiguous", "storage_offset"})

_SIZE_READS = frozenset({"shape", "size", "numel", "nelement", "__len__", "nbytes", *_STRIDE_READS})
"""Reads that give Python values which follow from the shapes the guard holds."""

_SYMBOLIC_READS = frozenset({"shape", "size", "numel", "nelement", "__len__"})
"""Those that a shadow answers."""

_STATIC_READS = frozenset(
    {
        "dtype",
        "device",
        "layout",
        "ndim",
        "dim",
        "ndimension",
        "itemsize",
        "element_size",
        "get_device",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_mps",
        "is_xpu",
        "is_sparse",
        "is_quantized",
        "is_nested",
        "is_mkldnn",
        "result_type",
    }
)
"""Reads that give Python values which follow from the dtypes and devices the guard holds."""

_AUTOGRAD_READS = frozenset({"requires_grad", "grad_fn", "is_leaf", "grad", "_version", "data_ptr"})

_DATA_READS = frozenset({"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "equal"})
"""Reads of a tensor's data that give Python values, for which meta tensors have none to give."""

_WRITERS = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__set__"})

_SIZED_BY_DATA = frozenset({"nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "bincount"})
