"""Install: put generated forwards under a live module, and take them away again.

The instance keeps its identity and gets a subclass of its class, made once per class, whose forward tries the guards
and otherwise runs the original. A subclass and not an attribute `forward`, because libraries wrap `forward` when a
class is made (gradient checkpointing) and look at its signature.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lpcompile.capture.children import MARK, Children
from lpcompile.capture.guards import Guard
from lpcompile.capture.recording import Recording
from lpcompile.frontends.graph_code import GraphCode, dumps, loads


class Clock(Protocol):
    """Says which phase of a policy schedule it is."""

    phase: int


@dataclass(frozen=True)
class Variant:
    """A generated forward and when it holds."""

    guard: Guard
    code: GraphCode
    out_spec: pytree.TreeSpec
    children: Children = field(default_factory=Children)

    @staticmethod
    def of(recording: Recording, graph: fx.Graph | None = None) -> "Variant":
        """The variant of a recording, with `graph` in place of the recorded one: same placeholders, same outputs."""
        code = GraphCode(graph or recording.graph, switches_grad_mode=recording.switches_grad_mode)
        return Variant(recording.guard, code, recording.out_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Variant":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # bytes, since pickle's protocols 2 and 3 (torch.save) cannot name what torch has in guards and graphs
        return _load_variant, (dumps((self.guard, self.code, self.out_spec)), self.children)

    def match(
        self, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> list[torch.Tensor | int] | str:
        """The graph's operands, or why it does not hold for this call."""
        differing = self.children.differing(module)
        return self.guard.match(module, args, kwargs) if differing is None else differing

    def run(self, module: nn.Module, operands: Sequence[torch.Tensor | int]) -> Any:
        outputs = self.code(module, operands)
        if self.out_spec.is_leaf():
            return outputs[0]
        return pytree.tree_unflatten(outputs, self.out_spec)


@dataclass
class CapturedForward:
    """What is installed under one module, and how often it held."""

    variants_by_phase: list[list[Variant]] = field(default_factory=list)
    clock: Clock | None = None
    """None: phase 0 for ever. A phase with no variants is the original forward."""
    num_hits: int = 0
    num_misses: int = 0
    first_miss: str | None = None

    @property
    def variants(self) -> list[Variant]:
        """Those of the present phase."""
        phase = 0 if self.clock is None else self.clock.phase
        return self.variants_by_phase[phase] if phase < len(self.variants_by_phase) else []

    def run(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The forward: the first variant whose guard holds, else the original."""
        variants = self.variants
        for variant in variants:
            operands = variant.match(module, args, kwargs)
            if not isinstance(operands, str):
                if not torch.compiler.is_compiling():  # where a counter would become a guard
                    self.num_hits += 1
                return variant.run(module, operands)
        if variants and not torch.compiler.is_compiling():
            self.num_misses += 1
            if self.first_miss is None:
                # what another variant says of the same training mode tells more than that the mode is another
                nearest = next((v for v in variants if v.guard.training in (None, module.training)), variants[0])
                why = nearest.match(module, args, kwargs)
                self.first_miss = why if isinstance(why, str) else None
        return original(module, *args, **kwargs)

    @property
    def is_picklable(self) -> bool:
        return all(variant.code.is_picklable for variants in self.variants_by_phase for variant in variants)


def install(module: nn.Module, variants: Sequence[Variant], *, phase: int = 0, clock: Clock | None = None) -> None:
    """Let `variants`, tried in order, be the forward of `module` in this phase. Replaces those of an earlier install.

    `clock.phase` is read at every call; a clock given once stays.
    """
    record = captured(module)
    if record is None:
        record = CapturedForward()
        if _captured_base(type(module)) is None:
            module.__class__ = captured_class(type(module))
        vars(module)[RECORD] = record
    while len(record.variants_by_phase) <= phase:
        record.variants_by_phase.append([])
    record.variants_by_phase[phase] = [replace(variant, children=_children(module, variant)) for variant in variants]
    for variant in variants:
        variant.code.compiled()
    record.clock = clock or record.clock


def _children(module: nn.Module, variant: Variant) -> Children:
    """Those that the graph calls, or that were folded into what it calls."""
    called = [str(node.target) for node in variant.code.graph.find_nodes(op="call_module")]
    return Children.of(module, (*called, *variant.guard.unhooked))


def uninstall(module: nn.Module) -> None:
    """Give the module its own class back. Under a wrapper's subclass (FSDP2) only the generated forwards go."""
    vars(module).pop(RECORD, None)
    vars(module).pop(MARK, None)
    if _captured_base(type(module)) is type(module):
        module.__class__ = _original_class(type(module))


def captured(module: nn.Module) -> CapturedForward | None:
    """What is installed under the module."""
    return vars(module).get(RECORD)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module without what is installed, bound to it."""
    base = _captured_base(type(module))
    return module.forward if base is None else MethodType(_original_class(base).forward, module)


def captured_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` whose forward tries what is installed. Name, signature and docstring are those of `cls`."""
    made = _MADE.get(cls)
    if made is None:
        made = _MADE[cls] = _make_class(cls)
    return made


def _load_variant(held: bytes, children: Children) -> Variant:
    guard, code, out_spec = loads(held)
    return Variant(guard, code, out_spec, children)


def _make_class(cls: type[nn.Module]) -> type[nn.Module]:
    original = cls.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is None:
            return original(self, *args, **kwargs)
        return record.run(self, original, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = super(made, self).__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        function, args, *rest = reduced
        args = tuple(cls if arg is made else arg for arg in args)
        record = captured(self)
        is_kept = record is not None and record.is_picklable
        if not is_kept and rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != RECORD}
        return _rebuild, (function, args, is_kept), *rest

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        return _deepcopy(made, self, memo)

    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "forward": forward,
        "__reduce_ex__": reduce,
        "__deepcopy__": deepcopy,
        _ORIGINAL: cls,
    }
    metaclass: Any = type(cls)
    made: type[nn.Module] = metaclass(cls.__name__, (cls,), namespace)
    return made


def _rebuild(function: Callable[..., nn.Module], args: tuple[Any, ...], is_captured: bool) -> nn.Module:
    """An instance of the original class, ready for its captured forward if that could be pickled."""
    module = function(*args)
    if is_captured:
        module.__class__ = captured_class(type(module))
    return module


def _deepcopy(made: type[nn.Module], module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    own: Callable[[dict[int, Any]], nn.Module] | None = getattr(super(made, module), "__deepcopy__", None)
    if own is not None:
        return own(memo)
    reduced: Any = super(made, module).__reduce_ex__(4)
    function, args, state, *_ = reduced
    copied: nn.Module = function(*args)
    memo[id(module)] = copied
    copied.__setstate__(copy.deepcopy(state, memo))
    return copied


def _captured_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class made here among the bases of `cls`, which a wrapper may have subclassed again."""
    return next((base for base in cls.__mro__ if _ORIGINAL in vars(base)), None)


def _original_class(made: type[nn.Module]) -> type[nn.Module]:
    return vars(made)[_ORIGINAL]


RECORD = "_lp_captured"
"""Where the CapturedForward lies in the instance's __dict__: no submodule, no buffer, not in the state_dict."""

_ORIGINAL = "_lp_original_class"

_MADE: dict[type, type[nn.Module]] = {}
"""One subclass per class, whatever number of instances."""
