"""Install: let a record of ours be the forward of a live module, and take it away again.

The instance keeps its identity and gets a subclass of its class, made once per class, whose forward runs the record. A
subclass and not an attribute `forward`, because libraries wrap `forward` when a class is made (gradient checkpointing)
and look at its signature. The class itself is never written. A module whose forward lies on the instance already (a
user's, accelerate's hooks) keeps it: the record runs before it.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import nn


class Record(Protocol):
    """What runs in the place of a module's forward."""

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The forward; `original(module, ...)` is the module's own."""
        ...


def install(module: nn.Module, record: Record) -> None:
    """Let `record` be the forward of `module`."""
    if _captured_base(type(module)) is None:
        module.__class__ = captured_class(type(module))
    vars(module)[RECORD] = record
    own = vars(module).get("forward")
    if own is not None and not _is_ours(own):
        vars(module)["forward"] = functools.update_wrapper(functools.partial(_run_own, module, own), own)


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that lies on the instance, if one does: not what runs our record before it."""
    own: Any = vars(module).get("forward")
    return own.args[1] if _is_ours(own) else own


def is_overridden(module: nn.Module) -> bool:
    """Whether a forward lies on the instance that runs no record of ours first, nor wraps what was there."""
    own = vars(module).get("forward")
    return own is not None and not _is_ours(own) and not hasattr(own, "__wrapped__")


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _run_own


def _run_own(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of an instance under a record."""
    record = installed(module)
    if record is None:
        return own(*args, **kwargs)
    return record.run(module, lambda _, *args, **kwargs: own(*args, **kwargs), args, kwargs)


def uninstall(module: nn.Module) -> None:
    """Give the module its own class back. Under a wrapper's subclass (FSDP2) only the record goes."""
    vars(module).pop(RECORD, None)
    if _is_ours(vars(module).get("forward")):
        vars(module)["forward"] = own_forward(module)
    if _captured_base(type(module)) is type(module):
        module.__class__ = _original_class(type(module))


def installed(module: nn.Module) -> Any:
    """The record of the module, if it has one."""
    return vars(module).get(RECORD)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the module has where nothing is installed."""
    made = _captured_base(type(module))
    return type(module).forward if made is None else _original_class(made).forward


def captured_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` whose forward runs what is installed. Name, signature and docstring are those of `cls`."""
    made = _MADE.get(cls)
    if made is None:
        made = _MADE[cls] = _make_class(cls)
    return made


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
        return _rebuild, (function, args, installed(self) is not None), *rest

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        return _deepcopy(made, self, memo)

    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "forward": forward,
        "__reduce_ex__": reduce,
        "__deepcopy__": deepcopy,
        ORIGINAL: cls,
    }
    metaclass: Any = type(cls)
    made: type[nn.Module] = metaclass(cls.__name__, (cls,), namespace)
    return made


def _rebuild(function: Callable[..., nn.Module], args: tuple[Any, ...], is_captured: bool) -> nn.Module:
    """An instance of the original class, ready for its record."""
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
    return next((base for base in cls.__mro__ if ORIGINAL in vars(base)), None)


def _original_class(made: type[nn.Module]) -> type[nn.Module]:
    return vars(made)[ORIGINAL]


RECORD = "_lp_captured"
"""Where the record lies in the instance's __dict__: no submodule, no buffer, not in the state_dict."""

ORIGINAL = "_lp_original_class"

_MADE: dict[type, type[nn.Module]] = {}
"""One subclass per class, whatever number of instances."""
