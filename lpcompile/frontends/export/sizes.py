"""Sizes: which sizes of its tensors an exported graph stands for, as one function that is checked at each call.

def fits(t0, t1):
    s0 = t0.size(0)
    return 2 <= s0 and t0.size(1) == 12 and t1.size(0) == s0
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter

from lpcompile.errors import NotSupported


@dataclass(frozen=True)
class SizeRules:
    """`source` defines `fits`; `fixed` names the sizes above 1 that the forward allows no other value of."""

    source: str
    fixed: tuple[str, ...]

    @cached_property
    def fits(self) -> Callable[..., bool]:
        """Whether the graph stands for tensors of these sizes; they have the ranks of the example's."""
        namespace: dict[str, Any] = dict(SYMPY_INTERP)
        exec(self.source, namespace)
        found: Callable[..., bool] = namespace["fits"]
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "fixed": self.fixed}  # a compiled function does not pickle


def size_rules(tensors: Sequence[Tensor], program: torch.export.ExportedProgram) -> SizeRules:
    """The rules of an export whose tensors, without data, are these. Raises NotSupported where sizes follow from
    data.
    """
    printer, env = PythonPrinter(), None
    symbols: dict[Any, str] = {}
    derived: list[tuple[str, Any]] = []
    conditions: list[str] = []
    fixed: list[str] = []
    for number, tensor in enumerate(tensors):
        for dim, size in enumerate(tensor.shape):
            source = f"t{number}.size({dim})"
            if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
                conditions.append(f"{source} == {int(size)}")
                fixed += [f"dim {dim} of tensor {number} is {int(size)}"] if int(size) > 1 else []
                continue
            env, expr = size.node.shape_env, size.node.expr
            if expr.is_symbol and expr not in symbols:
                symbols[expr] = source
            else:
                derived.append((source, expr))
    for symbol in symbols:
        known = program.range_constraints.get(symbol)
        if known is not None:
            conditions += [f"{int(known.lower)} <= {symbol}"] if int(known.lower) > 0 else []
            conditions += [f"{symbol} <= {int(known.upper)}"] if known.upper is not int_oo else []
    conditions += [f"{source} == {printer.doprint(expr)}" for source, expr in derived]
    if env is not None:
        rules = [env.replace(guard.expr) for guard in env.guards]
        for rule in dict.fromkeys(rules):
            if rule == True:  # noqa: E712, sympy's own
                continue
            if not rule.free_symbols <= symbols.keys():
                raise NotSupported("sizes in its forward follow from data")
            conditions.append(f"({printer.doprint(rule)})")
    lines = [f"def fits({', '.join(f't{number}' for number in range(len(tensors)))}):"]
    lines += [f"    {symbol} = {source}" for symbol, source in symbols.items()]
    lines.append(f"    return {' and '.join(conditions) or 'True'}")
    return SizeRules("\n".join(lines) + "\n", tuple(fixed))
