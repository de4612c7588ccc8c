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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

Size = int | torch.SymInt


class Shapes:
    """The sizes of one call. Leaves are the flat arguments, by index."""

    def __init__(self) -> None:
        self._env = ShapeEnv(duck_shape=False, allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self._mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._mode.cache_enabled = False  # an entry of its cache with symbols costs as much as the operation
        self._shadows: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # alive, so that no id is used twice
        self._symbols: dict[sympy.Symbol, tuple[int, int | None]] = {}
        self._leaves: dict[int, tuple[Size, ...]] = {}
        self._callers: dict[sympy.Symbol, Any] = {}
        self._shared: dict[Any, Size] = {}

    # -- arguments ---------------------------------------------------------------------------------------------------

    def add_tensor(self, index: int, tensor: Tensor, caller_sizes: tuple[Size, ...] | None) -> None:
        """`caller_sizes` are the sizes as the caller knows them: what is fixed there is fixed here, and what is one
        expression there is one symbol here. None: every size is a symbol of its own.
        """
        if id(tensor) in self._shadows:  # the same tensor twice
            self._leaves[index] = self.sizes(tensor)
            return
        given = caller_sizes if caller_sizes is not None else tuple(tensor.shape)
        free = caller_sizes is None
        sizes = tuple(
            self._symbol(index, dim, size, real, free)
            for dim, (size, real) in enumerate(zip(given, tensor.shape, strict=True))
        )
        self._leaves[index] = sizes
        self._cast_shadow(tensor, sizes)

    def add_size(self, index: int, size: torch.SymInt, *, known: bool) -> Size:
        """The symbol of an argument that is a size. `known`: `size` belongs to the shapes of the caller."""
        made = self._symbol(index, None, size, hint(size), not known)
        self._leaves[index] = (made,)
        return made

    def _symbol(self, index: int, dim: int | None, size: Size, real: int, free: bool) -> Size:
        expression = None if free or isinstance(size, int) else size.node.expr
        if real in (0, 1) or (expression is None and not free):
            return real
        if expression is not None and expression in self._shared:
            return self._shared[expression]
        source = _Argument(f"leaf{index}_{dim}")
        symbol = self._env.create_symbol(real, source, DimDynamic.DYNAMIC)
        made = self._env.create_symintnode(symbol, hint=real, source=source)
        self._symbols[symbol] = (index, dim)
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
        self._shadows[id(tensor)] = shadow
        self._kept.append(tensor)
        return shadow

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        was_quiet, _LOGGER.disabled = _LOGGER.disabled, True  # torch logs a traceback for each op without meta kernel
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad(), enable_python_dispatcher(), self._mode:
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
        """Run on shadows the operation that gave `result`."""
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs:
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
            return
        for tensor, shadow in zip(outputs, found):
            self._shadows[id(tensor)] = shadow
            self._kept.append(tensor)

    def add_alias(self, alias: Tensor, tensor: Tensor) -> None:
        self._shadows[id(alias)] = self._shadow_of(tensor)
        self._kept.append(alias)

    def fix(self, values: Any) -> None:
        """Hold these sizes for constants."""
        for leaf in pytree.tree_leaves(values):
            for size in self.sizes(leaf) if isinstance(leaf, Tensor) else (leaf,):
                if isinstance(size, torch.SymInt):
                    int(size)

    def fix_arguments(self) -> None:
        self.fix(list(self._leaves.values()))

    def fix_expression(self, expression: sympy.Basic) -> int:
        return int(self._env.create_symintnode(expression, hint=None))

    def _shadow_of(self, tensor: Tensor) -> Tensor:
        shadow = self._shadows.get(id(tensor))
        return self._cast_shadow(tensor, tuple(tensor.shape)) if shadow is None else shadow

    # -- the way back to the caller ----------------------------------------------------------------------------------

    def tell(self, caller: "Shapes", result: Any) -> Any:
        """Impose on the caller what this call demands of its sizes, and say there what the result's sizes are. Returns
        the result with sizes as the caller's."""
        with torch._C.DisableTorchFunction():
            for guard in self._guards():
                bool(self._evaluate(guard))
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and caller.shadow(tensor) is None and self.shadow(tensor) is not None:
                    caller._cast_shadow(tensor, tuple(map(self._for_caller, self.sizes(tensor))))
            return pytree.tree_map_only(torch.SymInt, self._for_caller, result)

    def _for_caller(self, size: Size) -> Size:
        return size if isinstance(size, int) else self._evaluate(size.node.expr)

    def _evaluate(self, expression: sympy.Basic) -> Any:
        if expression.is_Boolean and expression in (sympy.true, sympy.false):
            return expression is sympy.true
        return sympy_interp(PythonReferenceAnalysis, self._callers, expression)

    def _guards(self) -> list[sympy.Basic]:
        guards = [guard.expr for guard in self._env.guards]
        if all(guard.free_symbols <= self._symbols.keys() for guard in guards):
            return guards
        return [sympy.Eq(symbol, self._env.backed_var_to_val[symbol]) for symbol in self._symbols]

    # -- what the guard says -----------------------------------------------------------------------------------------

    def origin(self, symbol: sympy.Basic) -> tuple[int, int | None] | None:
        """(argument leaf, dim) that a symbol stands for; dim None: the leaf itself. None: not a size of an argument."""
        return self._symbols.get(symbol)

    def facts(self) -> tuple[dict[int, tuple[int | str, ...]], tuple[str, ...]]:
        """Per argument leaf its sizes, as numbers and names, and the conditions on the names, as Python source."""
        guards = self._guards()
        final = {}
        for symbol in self._symbols:
            replaced = self._env.replace(symbol)
            fixed = next((guard.rhs for guard in guards if _fixes(guard, symbol)), replaced)
            if fixed.is_Integer or fixed in self._symbols:
                final[symbol] = fixed
        names: dict[sympy.Basic, sympy.Symbol] = {}

        def name(size: Size) -> int | str:
            if isinstance(size, int):
                return size
            expression = size.node._expr.xreplace(final)
            if expression.is_Integer:
                return int(expression)
            return str(names.setdefault(expression, sympy.Symbol(f"s{len(names)}", integer=True, positive=True)))

        leaves = {index: tuple(map(name, sizes)) for index, sizes in self._leaves.items()}
        ranges = {symbol: ValueRanges(2, int_oo) for symbol in names}
        conditions = []
        for guard in dict.fromkeys(guard.xreplace(final) for guard in guards):
            if guard is not sympy.true and not _is_sure(guard, ranges):
                conditions.append(PythonPrinter().doprint(guard.xreplace(names)))
        values = {str(named): int(self._env.backed_var_to_val[symbol]) for symbol, named in names.items()}
        if not all(_holds(condition, values) for condition in conditions):
            # a condition that Python cannot say as it is: only the sizes of the example are sure
            return {index: tuple(map(hint, sizes)) for index, sizes in self._leaves.items()}, ()
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
    try:
        return eval(condition, {"math": math}, values) is True
    except (NameError, SyntaxError, TypeError, ArithmeticError, ValueError):
        return False


def _is_sure(guard: sympy.Basic, ranges: dict[sympy.Symbol, Any]) -> bool:
    try:
        bound = bound_sympy(guard, ranges)
    except (NotImplementedError, AssertionError, TypeError, ValueError, KeyError):
        return False
    return bool(bound.is_bool and bound.lower is sympy.true)


_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
