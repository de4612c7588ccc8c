"""Look: one call of a model on a copy of it, to see which products it writes, and what leaves no trace.

The copy is called in training and in evaluation mode, with copies of the arguments. Generators of random numbers, and
what the globals hold that a forward names, are put back. Of a large model the copy holds no data (FakeTensorMode),
unless its forward reads some. So it is with a model on the meta device, whose tensors then say themselves that they
hold no data: on plain meta tensors a forward that asks for a value fails.
"""

import copy
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.parameter import is_lazy

from lpcompile.errors import LpError
from lpcompile.frontends.install import install
from lpcompile.frontends.intercept.scope import CHECKPOINT, FUNCTION_APPLY, Scope, why_not_cast
from lpcompile.frontends.leaves.find import Leaf, leaf_forward
from lpcompile.frontends.leaves.leaf_forward import LeafForward
from lpcompile.plan import Sight
from passes.analysis.lengths import Lengths, lengths_of
from runtime.kernels.torch_ops import has_transforms
from runtime.ops.contractions import ConvGeometry
from runtime.ops.plan import contraction_of
from runtime.ops.product import Product
from runtime.quantize.cast_memo import MEMO
from runtime.state import RunState


@dataclass
class Seen:
    """What one or several calls showed."""

    calls: dict[str, int] = field(default_factory=dict)
    """Path of a module -> how often one call ran it, at most."""
    lengths: dict[str, Lengths] = field(default_factory=dict)
    """Of the sums of every product that ran, by site: the longest."""
    sights: dict[str, Sight] = field(default_factory=dict)
    """Products that modules write as operations, by site, in the order of the first call."""
    operands: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Which tensors the first call of each site read, by a number of the tensor."""
    unreal: dict[str, str] = field(default_factory=dict)
    """Why the operands of a site are not cast; empty where in some call they can be."""
    asides: dict[str, str] = field(default_factory=dict)
    """Path of a module -> whose products, among those that its forward leads to, are left alone."""
    last: Lengths = field(default_factory=dict)
    """Of the product that a scope found last."""
    writer: dict[str, str] = field(default_factory=dict)
    """Site -> path of the module that writes it."""
    ran: set[str] = field(default_factory=set)
    """Sites of the products that the last call ran, which is one in evaluation mode."""

    def note(self, site: str, lengths: Lengths, lhs: Tensor, rhs: Tensor) -> None:
        self.ran.add(site)
        self.operands.setdefault(site, (self._mark(lhs), self._mark(rhs)))
        known = self.lengths.setdefault(site, {})
        for role, length in lengths.items():
            if length:
                known[role] = max(length, known.get(role, 0))

    def _mark(self, x: Tensor) -> int:
        if has_transforms():  # what torch.func wraps lies nowhere, and is not cast
            return next(_NUMBERS)
        return MEMO.find_or_make(x, _MARK, lambda: next(_NUMBERS))

    def is_repeated(self, path: str) -> bool:
        """Whether one call runs the module several times."""
        return self.calls.get(path, 0) > 1

    def functional_sights(self) -> list[Sight]:
        """Those of operations, with all that was seen of them."""
        return [
            replace(
                sight,
                lengths=self.lengths.get(name, {}),
                unreal=self.unreal.get(name, ""),
            )
            for name, sight in self.sights.items()
        ]


def look_at(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: list[Leaf], scoped: list[str]
) -> Seen:
    """What a call of `model` runs: its leaves, and the products of the modules `scoped`, paths. Raises what the call
    raises.
    """
    _refuse_without_shapes(model)
    if _num_bytes(model) > _SMALL or any(parameter.is_meta for parameter in model.parameters()):
        try:
            return _call_copies(model, args, kwargs, leaves, scoped, FakeTensorMode(allow_non_fake_inputs=True))
        except Exception:  # it reads values: the copy must have some
            pass
    return _call_copies(model, args, kwargs, leaves, scoped, None)


def _call_copies(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    leaves: list[Leaf],
    scoped: list[str],
    fake: FakeTensorMode | None,
) -> Seen:
    """What was seen; under `fake`, whose tensors hold no data."""
    seen, per_call = Seen(), Counter[str]()
    copying = nullcontext() if fake is None else FakeCopyMode(fake)
    with no_trace(model), fake or nullcontext():
        with copying:
            twin = _copy(model)
        _install(twin, leaves, scoped, seen)
        for path, module in twin.named_modules():
            module.register_forward_pre_hook(_counting(path, per_call))
        for training in (True, False):
            if twin.training is not training:
                twin.train(training)
            per_call.clear()
            seen.ran.clear()
            with copying:
                its_args, its_kwargs = _copy_or_same(args), _copy_or_same(dict(kwargs))
            twin(*its_args, **its_kwargs)
            for path, count in per_call.items():
                seen.calls[path] = max(count, seen.calls.get(path, 0))
    return seen


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise LpError(
            "the model cannot be copied, and the example call is run on a copy",
            where="lpcompile(example_inputs=...)",
            expected="a model that copy.deepcopy takes",
            got=f"{type(error).__name__}: {error}",
            hint="no example inputs: products are then found as they run",
        ) from error


def _copy_or_same(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # a tensor with a history, a handle: the call has it as it is
        return value


def _refuse_without_shapes(model: nn.Module) -> None:
    """A lazy layer has no weight before its first call, and that of a copy would give it none."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise LpError(
                f"{name} has no shape yet",
                where="lpcompile(example_inputs=...)",
                expected="a model whose parameters and buffers have shapes",
                got=type(tensor).__name__,
                hint="a first call, model(*example_inputs), before lpcompile; or no example inputs",
            )


def _num_bytes(model: nn.Module) -> int:
    tensors = (*model.parameters(), *model.buffers())
    return sum(each.numel() * each.element_size() for each in tensors if not each.is_meta)


@dataclass(eq=False)
class _Spy:
    """In the place of a leaf's product: torch runs it, and its sizes are noted."""

    site: str
    kind: str
    seen: Seen

    def __call__(self, lhs: Tensor, rhs: Tensor, *rest: Any, geometry: ConvGeometry | None = None) -> Tensor:
        self.seen.note(self.site, lengths_of(self.kind, lhs.shape, rhs.shape, geometry), lhs, rhs)
        return contraction_of(self.kind, geometry).native(lhs, rhs, *(rest or (None,)))

    def count(self) -> None:
        """Torch runs it, and its sizes are those of its weight."""

    is_identity = True


@dataclass(eq=False)
class _LookingHost:
    """Notes the products that scopes see, and lets torch run them."""

    seen: Seen
    state: RunState = field(default_factory=RunState)

    def find(self, sight: Sight) -> list[Product | None]:
        self.seen.last = sight.lengths
        before = self.seen.sights.setdefault(sight.name, sight)
        if before.reason and not sight.reason:  # in another call it has a form
            self.seen.sights[sight.name] = replace(sight, reason="")
        return [None]


class _LookingScope(Scope):
    """A scope that forgets what it found, since each call may have other sizes."""

    def product(
        self, is_training: bool, name: str, op: str, kind: str, lhs: Tensor, rhs: Tensor, *rest: Any, **more: Any
    ) -> None:
        self._forget(name)
        super().product(is_training, name, op, kind, lhs, rhs, *rest, **more)
        seen, site = self.host.seen, self._site(name)  # type: ignore[attr-defined]
        seen.note(site, seen.last, lhs, rhs)
        unreal = why_not_cast(lhs) or why_not_cast(rhs)
        if not unreal or site not in seen.unreal:
            seen.unreal[site] = unreal

    def leave(self, name: str, op: str, reason: str) -> None:
        self._forget(name)
        super().leave(name, op, reason)

    def set_aside(self, writer: FrameType) -> None:
        asides = self.host.seen.asides  # type: ignore[attr-defined]
        if writer.f_code is FUNCTION_APPLY:
            name = writer.f_locals["cls"].__name__
            asides[self.path] = f"it calls {name}, an autograd.Function, whose products are its own"
        elif writer.f_code is CHECKPOINT:
            asides[self.path] = "it checkpoints a function, whose products are computed again where nothing sees them"

    def _forget(self, name: str) -> None:
        self.found.clear()
        self.host.seen.writer[self._site(name)] = self.path  # type: ignore[attr-defined]


def _install(twin: nn.Module, leaves: list[Leaf], scoped: list[str], seen: Seen) -> None:
    modules, host = dict(twin.named_modules()), _LookingHost(seen)
    for path in {leaf.path: None for leaf in leaves}:
        module = modules[path]
        parts = {leaf.part: _Spy(leaf.name, leaf.kind, seen) for leaf in leaves if leaf.path == path}
        install(module, LeafForward(leaf_forward(module), [parts], host.state))
    for path in scoped:
        install(modules[path], _LookingScope(path, host, is_entrance=True))


def _counting(path: str, calls: Counter[str]) -> Callable[..., None]:
    def count(*_: Any) -> None:
        calls[path] += 1

    return count


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Puts back what a call may change outside of the copy: random generators, and globals that a forward names."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    states = random.getstate(), numpy_random.get_state() if numpy_random else None
    kept = [(value, copy.deepcopy(value)) for value in _named_globals(model)]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
            yield
    finally:
        random.setstate(states[0])
        if numpy_random:
            numpy_random.set_state(states[1])
        for value, before in kept:
            _put_back(value, before)


def generator_states() -> tuple[Any, str]:
    """Of Python's generator of random numbers, and of numpy's."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    if numpy_random is None:
        return random.getstate(), ""
    _, words, *rest = numpy_random.get_state()
    return random.getstate(), f"{words.tobytes().hex()} {rest}"


def _named_globals(model: nn.Module) -> list[Any]:
    """Tensors, arrays and containers that the methods of the model's classes name as globals."""
    found: dict[int, Any] = {}
    for kind in {each for module in model.modules() for each in type(module).__mro__}:
        if kind.__module__.partition(".")[0] in _LIBRARIES:
            continue
        for method in vars(kind).values():
            code = getattr(method, "__code__", None)
            for name in code.co_names if code else ():
                value = method.__globals__.get(name)
                is_array = type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"
                if is_array or type(value) in (Tensor, list, dict, set, bytearray):
                    found[id(value)] = value
    return [value for value in found.values() if _is_plain(value)]


def _is_plain(value: Any) -> bool:
    """Whether it can be copied and put back without running code of others."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | set) else ()
    return all(isinstance(each, _PLAIN) or each is None for each in items)


def _put_back(value: Any, before: Any) -> None:
    with torch.no_grad():
        if isinstance(value, Tensor):
            if not torch.equal(value, before):
                value.copy_(before)
        elif isinstance(value, dict | set):
            value.clear()
            value.update(before)
        else:
            value[:] = before


_MARK = "number of the tensor"
_NUMBERS = itertools.count()
_PLAIN = (bool, int, float, complex, str, bytes, Tensor)
_LIBRARIES = frozenset({"torch", "transformers", "timm", "torchvision", "diffusers", "builtins"})
_SMALL = 1 << 28
"""Bytes of parameters and buffers up to which the copy has its data."""
