"""Shapes: the sizes in one call of a forward as symbols, so that its graph holds for other batches and lengths.

    x: (4, 16, 64)  ->  (s0, s1, s2)      F.linear(x, w_64)      ->  s2 == 64, a condition that the guard enforces
                                          x.shape[1] > 8         ->  s1 > 8, likewise

Every tensor of the call has a shadow without data whose sizes are torch.SymInt of a ShapeEnv. Each operation runs
on the shadows too, which says what it makes of the sizes and what it demands of them. What a shadow cannot follow
fixes the sizes that went in. Sizes 0 and 1 are never symbols, and a symbol is at least 2, as ShapeEnv assumes.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import Source
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from lpcompile.capture.guards import is_plain
from lpcompile.capture.script import Script, Size, Step, look, look_outside


class Shapes:
    """The sizes of one call. Leaves are the flat arguments, by index.

    With a script of an earlier call, the operations are compared with its steps, and the script's shadows are taken as
    long as they agree.
    """

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self._env = self.script.env
        self._position: int | None = None if script is None else 0
        """The next step of the script; None: it is written, or no longer followed."""
        self._is_writing = script is None
        self._shadows: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # alive, so that no id is used twice
        self._callers: dict[sympy.Symbol, Any] = {}
        self._shared: dict[Any, Size] = {}

    # -- arguments ---------------------------------------------------------------------------------------------------

    def add_tensor(self, index: int, tensor: Tensor, caller_sizes: tuple[Size, ...] | None) -> None:
        """`caller_sizes` are the sizes as the caller knows them: what is fixed there is fixed here, and what is one
        expression there is one symbol here. None: every size is a symbol of its own.
        """
        given = caller_sizes if caller_sizes is not None else tuple(tensor.shape)
        if self._position is not None:
            self._take_argument(index, given)
            self._keep(tensor, self.script.shadows[index])
            return
        if id(tensor) not in self._shadows:  # else the same tensor twice
            free = caller_sizes is None
            sizes = tuple(
                self._symbol(index, dim, size, real, free)
                for dim, (size, real) in enumerate(zip(given, tensor.shape, strict=True))
            )
            self._cast_shadow(tensor, sizes)
        self.script.shadows[index] = self._shadows[id(tensor)]
        self.script.leaves[index] = self.sizes(tensor)

    def add_size(self, index: int, size: torch.SymInt, *, known: bool) -> Size:
        """The symbol of an argument that is a size. `known`: `size` belongs to the shapes of the caller."""
        if self._position is not None:
            self._take_argument(index, (size,))
        else:
            self.script.leaves[index] = (self._symbol(index, None, size, hint(size), not known),)
        return self.script.leaves[index][0]

    def _take_argument(self, index: int, given: tuple[Size, ...]) -> None:
        """The symbols of the script stand for sizes of this caller."""
        for symbol, (leaf, dim) in self.script.symbols.items():
            if leaf == index:
                self._callers[symbol] = given[dim or 0]

    def _symbol(self, index: int, dim: int | None, size: Size, real: int, free: bool) -> Size:
        expression = None if free or isinstance(size, int) else size.node.expr
        if real in (0, 1) or (expression is None and not free):
            return real
        if expression is not None and expression in self._shared:
            return self._shared[expression]
        source = _Argument(f"leaf{index}_{dim}")
        symbol = self._env.create_symbol(real, source, DimDynamic.DYNAMIC)
        made = self._env.create_symintnode(symbol, hint=real, source=source)
        self.script.symbols[symbol] = (index, dim)
        self._callers[symbol] = size
        if expression is not None:
            self._shared[expression] = made
        return made

    def _cast_shadow(self, tensor: Tensor, sizes: tuple[Size, ...]) -> Tensor:
        """A shadow of these sizes, with strides that grow as the tensor's do."""
        strides: list[Size] = [0] * len(sizes)
        expected: Size = 1
        real = tensor.stride() if tensor.layout is torch.strided else torch.empty(tensor.shape, device="meta").stride()
        for dim in sorted(range(len(sizes)), key=lambda dim: (real[dim], -dim)):
            strides[dim] = expected if real[dim] == hint(expected) else real[dim]
            expected = strides[dim] * sizes[dim]
        with self._unseen():
            shadow = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
        return self._keep(tensor, shadow)

    def _keep(self, tensor: Tensor, shadow: Tensor) -> Tensor:
        self._shadows[id(tensor)] = shadow
        self._kept.append(tensor)
        return shadow

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        was_quiet, _LOGGER.disabled = _LOGGER.disabled, True  # torch logs a traceback for each op without meta kernel
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad(), enable_python_dispatcher(), self.script.mode:
                yield
        finally:
            _LOGGER.disabled = was_quiet

    # -- operations --------------------------------------------------------------------------------------------------

    def sizes(self, tensor: Tensor) -> tuple[Size, ...]:
        """Of a tensor without a shadow (a parameter) the real ones."""
        shadow = self._shadows.get(id(tensor))
        return tuple(tensor.shape if shadow is None else shadow.shape)

    def shadow(self, tensor: Tensor) -> Tensor | None:
        return self._shadows.get(id(tensor))

    def follow(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """What the operation that gave `result` makes of the sizes: from the script, or run on shadows."""
        leaves = [result] if isinstance(result, Tensor) else pytree.tree_leaves(result)
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not outputs or self._plays(func, (args, kwargs), outputs):
            return
        try:
            shadows, options = pytree.tree_map_only(Tensor, self._shadow_of, (tuple(args), dict(kwargs)))
            with self._unseen():
                made = func(*shadows, **options)
            found = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
            is_followed = [tuple(map(hint, leaf.shape)) for leaf in found] == [tuple(leaf.shape) for leaf in outputs]
        except Exception:  # whatever an operation without data may raise: the sizes are then fixed
            is_followed = False
        if not is_followed:
            self.fix((args, kwargs))
        self._write(func, (args, kwargs), outputs, tuple(found) if is_followed else None)

    def add_alias(self, alias: Tensor, tensor: Tensor) -> None:
        self._keep(alias, self._shadow_of(tensor))

    def _take(self, tensor: Tensor, sizes: tuple[Size, ...]) -> None:
        """A tensor that a child made, with the sizes it says."""
        arguments = sizes, tensor.stride() if tensor.layout is torch.strided else None
        if not self._plays(_TAKE, arguments, [tensor]):
            self._write(_TAKE, arguments, [tensor], (self._cast_shadow(tensor, sizes),))

    # -- the script --------------------------------------------------------------------------------------------------

    @property
    def follows(self) -> bool:
        """Whether every step of an earlier call's script was the same in this one, up to the last."""
        return self._position == len(self.script.steps)

    def forbid_following(self) -> None:
        """Sizes changed in place: the shadows of the script are no longer what they were at an earlier step."""
        self.script.is_good = False
        self._position = None

    def _plays(self, function: Any, arguments: Any, outputs: list[Tensor]) -> bool:
        """Whether the next step of the script is this operation; its shadows are then those of `outputs`."""
        if self._position is None:
            return False
        step = self.script.steps[self._position] if self._position < len(self.script.steps) else None
        if (
            step is None
            or step.function != function
            or not self._is_equal(step.arguments, arguments)
            or step.outputs != tuple(map(look, outputs))
        ):
            self.forbid_following()
            return False
        self._position += 1
        for tensor, shadow in zip(outputs, step.shadows or ()):
            self._keep(tensor, shadow)
        return True

    def _write(self, function: Any, arguments: Any, outputs: list[Tensor], shadows: tuple[Tensor, ...] | None) -> None:
        if self._is_writing and self.script.is_good:
            try:
                written = self._written(arguments)
            except (RuntimeError, NotImplementedError):  # a tensor that no shadow can be made of
                self.script.is_good = False
            else:
                self.script.steps.append(Step(function, written, tuple(map(look, outputs)), shadows))
        for tensor, shadow in zip(outputs, shadows or ()):
            self._keep(tensor, shadow)

    def _written(self, value: Any) -> Any:
        """Arguments as a step keeps them: shadows for tensors, and containers that nobody else can change."""
        if isinstance(value, Tensor):
            return self._shadow_of(value)
        if isinstance(value, (tuple, list)):
            return tuple(self._written(item) for item in value)
        if isinstance(value, Mapping):
            return {key: self._written(item) for key, item in value.items()}
        if type(value) is slice:
            return slice(*map(self._written, (value.start, value.stop, value.step)))
        return value

    def _is_equal(self, written: Any, value: Any) -> bool:
        if isinstance(value, Tensor):
            shadow = self._shadows.get(id(value))
            if shadow is not None or id(written) not in self.script.outside:
                return shadow is written
            shadow, said = self.script.outside[id(written)]
            if look_outside(value) != said:
                return False
            self._keep(value, shadow)
            return True
        if isinstance(value, (tuple, list)):
            return (
                type(written) is tuple
                and len(written) == len(value)
                and all(self._is_equal(*pair) for pair in zip(written, value))
            )
        if isinstance(value, Mapping):
            return (
                type(written) is dict
                and list(written) == list(value)
                and all(self._is_equal(written[key], item) for key, item in value.items())
            )
        if type(value) is not type(written):
            return False
        if isinstance(value, _SYMBOLIC):
            return bool(value.node.expr == written.node.expr)
        if type(value) is slice:
            return all(self._is_equal(getattr(written, part), getattr(value, part)) for part in _SLICE)
        return value is written or (is_plain(value) and bool(value == written))

    def fix(self, values: Any) -> None:
        """Hold these sizes for constants."""
        for leaf in pytree.tree_leaves(values):
            for size in self.sizes(leaf) if isinstance(leaf, Tensor) else (leaf,):
                if isinstance(size, torch.SymInt):
                    int(size)

    def fix_arguments(self) -> None:
        self.fix(list(self.script.leaves.values()))

    def fix_expression(self, expression: sympy.Basic) -> int:
        return int(self._env.create_symintnode(expression, hint=None))

    def _shadow_of(self, tensor: Tensor) -> Tensor:
        shadow = self._shadows.get(id(tensor))
        if shadow is None:
            shadow = self._cast_shadow(tensor, tuple(tensor.shape))
            self.script.outside[id(shadow)] = shadow, look_outside(tensor)
        return shadow

    # -- the way back to the caller ----------------------------------------------------------------------------------

    def tell(self, caller: "Shapes", result: Any) -> Any:
        """Impose on the caller what this call demands of its sizes, and say there what the result's sizes are. Returns
        the result with sizes as the caller's."""
        names = tuple(size if isinstance(size, int) else size.node.expr for size in self._callers.values())
        state, sizes = self.script.told.get((caller.script, names), (None, {}))

        def for_caller(size: Size) -> Size:
            if isinstance(size, int):
                return size
            if size.node.expr not in sizes:
                sizes[size.node.expr] = self._evaluate(size.node.expr)
            return sizes[size.node.expr]

        with torch._C.DisableTorchFunction():
            if state != self.script.state:
                for guard in self._guards():
                    bool(self._evaluate(guard))
                self.script.told[caller.script, names] = self.script.state, sizes
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and caller.shadow(tensor) is None and self.shadow(tensor) is not None:
                    caller._take(tensor, tuple(map(for_caller, self.sizes(tensor))))
            return pytree.tree_map_only(torch.SymInt, for_caller, result)

    def _evaluate(self, expression: sympy.Basic) -> Any:
        if expression.is_Boolean and expression in (sympy.true, sympy.false):
            return expression is sympy.true
        return sympy_interp(PythonReferenceAnalysis, self._callers, expression)

    def _guards(self) -> list[sympy.Basic]:
        guards = [guard.expr for guard in self._env.guards]
        if all(guard.free_symbols <= self.script.symbols.keys() for guard in guards):
            return guards
        return [sympy.Eq(symbol, self._env.backed_var_to_val[symbol]) for symbol in self.script.symbols]

    # -- what the guard says -----------------------------------------------------------------------------------------

    def origin(self, symbol: sympy.Basic) -> tuple[int, int | None] | None:
        """(argument leaf, dim) that a symbol stands for; dim None: the leaf itself. None: not a size of an argument."""
        return self.script.symbols.get(symbol)

    def facts(self) -> tuple[dict[int, tuple[int | str, ...]], tuple[str, ...]]:
        """Per argument leaf its sizes, as numbers and names, and the conditions on the names, as Python source."""
        if self.script.facts is None or self.script.facts[0] != self.script.state:
            facts = self._state_facts()
            self.script.facts = self.script.state, facts
        return self.script.facts[1]

    def _state_facts(self) -> tuple[dict[int, tuple[int | str, ...]], tuple[str, ...]]:
        guards = self._guards()
        final = {}
        for symbol in self.script.symbols:
            replaced = self._env.replace(symbol)
            fixed = next((guard.rhs for guard in guards if _fixes(guard, symbol)), replaced)
            if fixed.is_Integer or fixed in self.script.symbols:
                final[symbol] = fixed
        names: dict[sympy.Basic, sympy.Symbol] = {}

        def name(size: Size) -> int | str:
            if isinstance(size, int):
                return size
            expression = size.node._expr.xreplace(final)
            if expression.is_Integer:
                return int(expression)
            return str(names.setdefault(expression, sympy.Symbol(f"s{len(names)}", integer=True, positive=True)))

        leaves = {index: tuple(map(name, sizes)) for index, sizes in self.script.leaves.items()}
        ranges = {symbol: ValueRanges(2, int_oo) for symbol in names}
        conditions = []
        for guard in dict.fromkeys(guard.xreplace(final) for guard in guards):
            if guard is not sympy.true and not _is_sure(guard, ranges):
                conditions.append(PythonPrinter().doprint(guard.xreplace(names)))
        values = {str(named): int(self._env.backed_var_to_val[symbol]) for symbol, named in names.items()}
        if not all(_holds(condition, values) for condition in conditions):
            # a condition that Python cannot say as it is: only the sizes of the example are sure
            return {index: tuple(map(hint, sizes)) for index, sizes in self.script.leaves.items()}, ()
        return leaves, tuple(dict.fromkeys(conditions))


class _Argument(Source):
    """The name of a size, as ShapeEnv wants it."""

    def __init__(self, label: str) -> None:
        object.__setattr__(self, "label", label)

    @property
    def name(self) -> str:
        return str(vars(self)["label"])

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Argument) and other.name == self.name


def hint(size: Size) -> int:
    """The size in the example, with no condition imposed."""
    return size if isinstance(size, int) else int(size.node.hint)


def concrete(value: Any) -> Any:
    """The value with the example's numbers in place of symbolic ones; the same object if there are none."""
    if isinstance(value, _SYMBOLIC):
        return value.node.hint
    if isinstance(value, (tuple, list)):
        items = [concrete(item) for item in value]
        if all(now is before for now, before in zip(items, value)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {key: concrete(item) for key, item in value.items()}
    if type(value) is slice:
        return slice(concrete(value.start), concrete(value.stop), concrete(value.step))
    return value


def _fixes(guard: sympy.Basic, symbol: sympy.Symbol) -> bool:
    return isinstance(guard, sympy.Eq) and guard.lhs == symbol and guard.rhs.is_Integer


def _holds(condition: str, values: dict[str, int]) -> bool:
    """Whether the condition is true of the sizes; one that cannot be computed is not."""
    try:
        return eval(condition, {"math": math}, values) is True
    except (NameError, SyntaxError, TypeError, ArithmeticError, ValueError):
        return False


def _is_sure(guard: sympy.Basic, ranges: dict[sympy.Symbol, Any]) -> bool:
    """Whether the guard holds for all sizes in range. What sympy cannot bound is not sure, and stays a condition."""
    try:
        bound = bound_sympy(guard, ranges)
    except (NotImplementedError, AssertionError, TypeError, ValueError, KeyError):
        return False
    return bool(bound.is_bool and bound.lower is sympy.true)


_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

_SLICE = ("start", "stop", "step")

_TAKE = object()
"""The step in which a caller takes a tensor from a child."""
