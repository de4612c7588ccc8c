"""Declared: what an lp op is, beside what it computes: operands, attributes and rules, by its signature.

The ops themselves are in runtime/ops/dialect.py.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

from torch import Tensor

from runtime.ops.types import OperandKind, Operands, ResultRule, unknown_result
from runtime.state import RunState

Grid = Annotated[Tensor, "grid"]
"""An operand that holds grid values."""
Scale = Annotated[Tensor, "scale"]
"""An operand that holds the scale of a cast, fp32."""


@dataclass(frozen=True)
class Rule:
    """A trait of an op: the sentence is the error, `holds(attributes)` decides."""

    sentence: str
    holds: Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class TypeRule:
    """A trait of an op that its operands' types decide too: the sentence is the error."""

    sentence: str
    holds: Callable[[Operands, dict[str, Any]], bool]


@dataclass(frozen=True)
class OperandDef:
    """A positional parameter of an op's function. An optional one may be None."""

    name: str
    kind: OperandKind
    is_optional: bool

    def __str__(self) -> str:
        return f"{self.name}?" if self.is_optional else self.name


@dataclass(frozen=True)
class AttributeDef:
    """A keyword parameter of an op's function; `kind` is str, int, float or bool. One with a default may be
    left out.
    """

    name: str
    kind: type
    is_optional: bool

    def __str__(self) -> str:
        return f"{self.name}?" if self.is_optional else self.name


@dataclass(frozen=True)
class OpDef:
    """One op, declared by its function: positional parameters are operands, keywords are attributes, and the docstring
    says what it computes. `result` gives the type of its result, `rules` and `type_rules` what else must hold.
    """

    name: str
    run: Callable[..., Any]
    result: ResultRule = unknown_result
    rules: tuple[Rule, ...] = ()
    type_rules: tuple[TypeRule, ...] = ()

    @cached_property
    def operands(self) -> tuple[OperandDef, ...]:
        return tuple(
            OperandDef(name, _operand_kind(hint), NoneType in get_args(hint))
            for name, hint, parameter in self._parameters
            if parameter.kind is not parameter.KEYWORD_ONLY
        )

    @cached_property
    def attributes(self) -> tuple[AttributeDef, ...]:
        return tuple(
            AttributeDef(name, hint, parameter.default is not parameter.empty)
            for name, hint, parameter in self._parameters
            if parameter.kind is parameter.KEYWORD_ONLY
        )

    @property
    def _parameters(self) -> list[tuple[str, Any, inspect.Parameter]]:
        hints = get_type_hints(self.run, include_extras=True)
        return [(name, hints[name], each) for name, each in inspect.signature(self.run).parameters.items()]


def _operand_kind(hint: Any) -> OperandKind:
    """Of `Tensor`, `Grid`, `Scale` or `RunState`, or one of them or None."""
    for each in (hint, *get_args(hint)):
        if metadata := getattr(each, "__metadata__", None):
            return metadata[0]
        if each in (Tensor, RunState):
            return "tensor" if each is Tensor else "state"
    raise TypeError(f"{hint} is no type of an operand")
