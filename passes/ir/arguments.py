"""Arguments: what a call is given beside its operands, as Python would write it, `_, (_, -1, 16), dim=None`.

Each `_` is the next operand. Beside them stand plain values: None, True, numbers, inf, nan, strings, `...`, tuples,
lists, dicts, slice(0, None), range(0, 3), complex(0.0, 1.0), torch.bfloat16, torch.device('cpu'), torch.strided,
torch.Size([2, 3]).
"""

import ast
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

HOLE = "_"


class Unprintable(Exception):
    """A value that has no text; completes "... has no text"."""


def print_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, list[fx.Node]]:
    """The text and the operands, in the order of the text. Raises Unprintable."""
    operands: list[fx.Node] = []
    parts = [_print(arg, operands) for arg in args]
    parts += [f"{_keyword(name)}={_print(value, operands)}" for name, value in kwargs.items()]
    return ", ".join(parts), operands


def parse_arguments(text: str, operands: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `print_arguments` printed. Raises ArgumentsError for text that is no such list, or has too many or too few
    holes.
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        depth = _depth(call)
    except (RecursionError, MemoryError):
        raise ArgumentsError(f"at most {_DEEPEST} levels of nesting", "more", 0) from None
    except (SyntaxError, ValueError) as error:
        column = error.offset - 3 if isinstance(error, SyntaxError) and error.offset else 0
        raise ArgumentsError("arguments as Python writes them", str(error).partition(" (")[0], column) from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "f":
        raise ArgumentsError("one list of arguments", text, 0)
    if depth > _DEEPEST:
        raise ArgumentsError(f"at most {_DEEPEST} levels of nesting", str(depth), 0)
    holes = iter(operands)
    args = tuple(_read(each, holes) for each in call.args)
    kwargs = {}
    for each in call.keywords:
        if each.arg is None:
            raise _unknown(each.value)
        if each.arg in kwargs:
            raise ArgumentsError("each keyword once", f"{each.arg} twice", each.col_offset - 2)
        kwargs[each.arg] = _read(each.value, holes)
    if any(True for _ in holes):
        count = num_holes(text)
        raise ArgumentsError(f"as many `{HOLE}` as operands, {len(operands)}", str(count), 0)
    return args, kwargs


def num_holes(text: str) -> int:
    """How many operands the arguments take. Raises SyntaxError."""
    return sum(isinstance(node, ast.Name) and node.id == HOLE for node in ast.walk(ast.parse(f"f({text})")))


class ArgumentsError(Exception):
    """(expected, got, column in the text, from 0)"""

    def __init__(self, expected: str, got: str, column: int) -> None:
        super().__init__(expected, got, column)
        self.expected, self.got, self.column = expected, got, column


def _keyword(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise Unprintable(f"the keyword {name!r}")
    return name


def _print(value: Any, operands: list[fx.Node]) -> str:
    if isinstance(value, fx.Node):
        operands.append(value)
        return HOLE
    kind = type(value)
    if isinstance(value, (torch.Size, range)):
        items = ", ".join(map(str, value))
        return f"torch.Size([{items}])" if isinstance(value, torch.Size) else repr(value)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        items = ", ".join(_print(item, operands) for item in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, list):  # fx's immutable list is one
        return f"[{', '.join(_print(item, operands) for item in value)}]"
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return f"{{{', '.join(f'{key!a}: {_print(item, operands)}' for key, item in value.items())}}}"
    if kind is slice:
        parts = [value.start, value.stop, value.step]
        while len(parts) > 1 and parts[-1] is None:
            parts.pop()
        if len(parts) == 1:  # slice(a) would be the stop
            parts.append(None)
        return f"slice({', '.join(_print(part, operands) for part in parts)})"
    if kind is complex:
        return f"complex({value.real}, {value.imag})"
    if kind in _PLAIN:
        return ascii(value)
    if kind is type(...):
        return "..."
    if kind in (torch.dtype, torch.layout, torch.memory_format):
        return str(value)
    if kind is torch.device:
        return f"torch.device('{value}')"
    raise Unprintable(f"a {kind.__module__}.{kind.__qualname__}")


def _read(node: ast.expr, holes: Iterator[Any]) -> Any:
    match node:
        case ast.Name(id=name) if name == HOLE:
            try:
                return next(holes)
            except StopIteration:
                raise ArgumentsError("an operand for each `_`", "more `_` than operands", node.col_offset - 2) from None
        case ast.Name(id="inf"):
            return math.inf
        case ast.Name(id="nan"):
            return math.nan
        case ast.Constant(value=value):
            return value
        case ast.Tuple(elts=items):
            return tuple(_read(item, holes) for item in items)
        case ast.List(elts=items):
            return [_read(item, holes) for item in items]
        case ast.Dict(keys=keys, values=values):
            if not all(isinstance(key, ast.Constant) and type(key.value) is str for key in keys):
                raise _unknown(node)
            if len({key.value for key in keys}) < len(keys):  # type: ignore[union-attr]
                raise ArgumentsError("each key once", ast.unparse(node), node.col_offset - 2)
            return {key.value: _read(value, holes) for key, value in zip(keys, values)}  # type: ignore[union-attr]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            number = _read(operand, holes)
            if type(number) in (int, float):
                return -number
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            value = getattr(torch, name, None)
            if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
                return value
        case ast.Call(func=function, args=args, keywords=[]):
            made = _MAKERS.get(ast.unparse(function))
            if made is not None:
                try:
                    return made(*(_read(arg, holes) for arg in args))
                except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                    raise ArgumentsError("a value of it", str(error).partition("\n")[0], node.col_offset - 2) from error
    raise _unknown(node)


def _depth(tree: ast.AST) -> int:
    """How many levels of nodes there are, counted without recursion."""
    level, count = [tree], 0
    while level:
        level, count = [child for node in level for child in ast.iter_child_nodes(node)], count + 1
    return count


def _size(items: tuple[int, ...] | list[int]) -> torch.Size:
    if not isinstance(items, (tuple, list)):  # a range may be of any length
        raise TypeError("a tuple or list of integers")
    return torch.Size(items)


def _unknown(node: ast.expr) -> ArgumentsError:
    known = f"`{HOLE}`, a plain value, a tuple, list or dict of them, {', '.join(_MAKERS)} or a dtype"
    return ArgumentsError(known, ast.unparse(node), node.col_offset - 2)


_PLAIN = (type(None), bool, int, float, str, bytes)

_MAKERS: dict[str, Callable[..., Any]] = {
    "slice": slice,
    "range": range,
    "complex": complex,
    "torch.device": torch.device,
    "torch.Size": _size,
}
_DEEPEST = 64
"""Levels of nesting of the arguments: Python recurses."""
