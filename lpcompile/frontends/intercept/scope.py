"""Scopes: a module whose own products are looked at while it runs.

    model.layers.0.self_attn     a Scope is its forward: it enters the mode, or finds it entered, and lays a Frame on it
    torch.matmul(q, k)           the mode asks the Frame, which numbers the product: ...self_attn.matmul_0

The mode is a TorchFunctionMode, so it is of one thread; a Frame is of one call. Nothing else changes as a model runs.
What a leaf multiplies is the leaf's. Products of an autograd.Function, of a module that is not part of the model, and
of a function under torch.utils.checkpoint, which is computed again out of sight, are not the scope's.
"""

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lpcompile.plan import Sight
from passes.analysis.lengths import lengths_of
from runtime.compile_marks import constant_result
from runtime.ops.contractions import ConvGeometry
from runtime.ops.product import Product, TracedProduct
from runtime.state import RunState


class Host(Protocol):
    """Whoever says what becomes of a product: the record of a compiled model."""

    state: RunState

    def find(self, sight: Sight) -> "list[Product | None]":
        """By phase of the schedule, evaluation last; None where the product runs as the uncompiled model has it."""
        ...


@dataclass(eq=False)
class Scope:
    """What is installed under a module whose products may be named. `is_entrance`: the mode is entered here."""

    path: str
    host: Host
    is_entrance: bool
    found: dict[str, "list[Product | None]"] = field(default_factory=dict, repr=False)
    key: str = field(default="", init=False)
    """By which code that is traced finds it: a text, since torch.compile makes a symbol of an int that has changed."""

    def __post_init__(self) -> None:
        self.key = f"scope {next(_NUMBERS)}"
        _SCOPES[self.key] = self

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self.__post_init__()

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The forward of the module."""
        mode = active_mode()
        if mode is None:
            if not self.is_entrance:
                return original(module, *args, **kwargs)
            mode = Interception()
            with mode:
                mode.frame = Frame(self, module.training)
                return original(module, *args, **kwargs)
        outer = mode.frame
        mode.frame = Frame(self, module.training)
        try:
            return original(module, *args, **kwargs)
        finally:
            mode.frame = outer

    def product(
        self,
        is_training: bool,
        name: str,
        op: str,
        kind: str,
        lhs: Tensor,
        rhs: Tensor,
        sizes: tuple[int | None, int | None] = (None, None),
        geometry: ConvGeometry | None = None,
        lhs_shape: Sequence[int] | None = None,
    ) -> "Product | TracedProduct | None":
        """What runs the product `name` of this module in its mode; None: torch does. `sizes`: n and k, where the
        right operand is the weight of a layer. `lhs_shape`: of the left operand, where `lhs` is what it is made of.
        """
        if torch.compiler.is_compiling():
            n, k = sizes
            text = _texts_of(self.key, name, op, kind, n, k)[self.host.state.phase_in(is_training)]
            return TracedProduct(text, self.host.state) if text else None
        phases = self.found.get(name)
        if phases is None:
            lengths = lengths_of(kind, lhs_shape or lhs.shape, rhs.shape, geometry)
            sight = Sight(self._site(name), op, kind, *sizes, lengths, owner=self.path)
            phases = self.found[name] = self.host.find(sight)
        product = phases[self.host.state.phase_in(is_training)]
        if product is None:
            return None
        if product.is_identity:
            product.count()
            return None
        for operand in (lhs, rhs):
            if reason := why_not_cast(operand):
                product.fall_through(reason)
                return None
        return product

    def leave(self, name: str, op: str, reason: str) -> None:
        """The product `name` has no lp form in this call, or in any."""
        if torch.compiler.is_compiling():
            return
        if name not in self.found:
            self.found[name] = self.host.find(Sight(self._site(name), op, "", reason=reason, owner=self.path))
        self.host.state.calls.fell_through(self._site(name), reason)

    def set_aside(self, writer: FrameType) -> None:
        """A product was written by something that the module called, which has it for itself."""

    def _site(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


class Frame:
    """One call of a module in training or evaluation mode: how many products of each kind it has written so far."""

    def __init__(self, scope: Scope, is_training: bool) -> None:
        self.scope, self.is_training = scope, is_training
        self.numbers: dict[str, int] = {}

    def name(self, stem: str) -> str:
        """The name of the next product of this stem, below the module."""
        number = self.numbers.get(stem, 0)
        self.numbers[stem] = number + 1
        return f"{stem}_{number}"

    def product(self, name: str, *product: Any, **more: Any) -> "Product | TracedProduct | None":
        """Scope.product, in the mode of the call."""
        return self.scope.product(self.is_training, name, *product, **more)


class Interception(TorchFunctionMode):
    """Hands products to the frame of the module that runs; None where they are nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.frame: Frame | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        frame = self.frame
        runner = None if frame is None else RUNNERS.get(func)
        if runner is None or frame is None:
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling() and (writer := writer_between()) is not None:
            frame.scope.set_aside(writer)
            return func(*args, **kwargs)
        return runner(frame, func, args, kwargs)


def active_mode() -> Interception | None:
    """The mode of this thread, if one is entered."""
    number = torch._C._len_torch_function_stack()
    while number:
        number -= 1
        mode = torch._C._get_function_stack_at(number)
        if type(mode) is Interception:
            return mode
    return None


def shielded(run: Callable[..., Any], *args: Any) -> Any:
    """run(*args), whose products are nobody's but its own."""
    mode = active_mode()
    if mode is None:
        return run(*args)
    if not torch.compiler.is_compiling():
        top = torch._C._len_torch_function_stack() - 1
        if torch._C._get_function_stack_at(top) is mode:  # the mode then costs the leaf nothing
            torch._C._pop_torch_function_stack()
            try:
                return run(*args)
            finally:
                torch._C._push_on_torch_function_stack(mode)
    outer = mode.frame
    mode.frame = None
    try:
        return run(*args)
    finally:
        mode.frame = outer


def writer_between() -> FrameType | None:
    """Who wrote the product that is being looked at, if it is not the module whose scope is innermost: the frame of
    what was called from there.
    """
    frame = sys._getframe(2)
    while frame.f_code is not _RUN:
        if frame.f_code in _NOT_OURS or frame.f_back is None:
            return frame
        frame = frame.f_back
    return None


def why_not_cast(x: Tensor) -> str:
    """Why an operand is not cast; empty if it can be."""
    if not x.is_floating_point():
        return f"an operand is {x.dtype}, and only real numbers are cast"
    if x.layout is not torch.strided or x.is_nested:
        return "an operand is sparse or nested, and only plain tensors are cast"
    return ""


@constant_result
def _texts_of(key: str, name: str, op: str, kind: str, n: int | None, k: int | None) -> tuple[str, ...]:
    """While torch.compile traces: by phase, what a TracedProduct reads; empty where torch runs the product."""
    scope = _SCOPES[key]
    if name not in scope.found:
        scope.found[name] = scope.host.find(Sight(scope._site(name), op, kind, n, k, owner=scope.path))
    return tuple("" if product is None or product.is_identity else product.text for product in scope.found[name])


RUNNERS: dict[Any, Callable[[Any, Any, tuple[Any, ...], Mapping[str, Any]], Any]] = {}
"""By torch function: `runner(frame, function, args, kwargs)`. Filled by lpcompile/frontends/intercept/products.py."""

_RUN = Scope.run.__code__
FUNCTION_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
CHECKPOINT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__
_NOT_OURS = frozenset({nn.Module._call_impl.__code__, FUNCTION_APPLY, CHECKPOINT})
"""Code between a product and our scope: of a module without one, of an autograd.Function, of a checkpoint."""
_NUMBERS = itertools.count()
_SCOPES: WeakValueDictionary[str, Scope] = WeakValueDictionary()
