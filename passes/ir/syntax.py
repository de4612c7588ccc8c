"""Syntax: MLIR's generic form as a tree of operations, read and written; what the operations mean is not asked here.

    op         [%r {, %r} =] "NAME" ( [%x {, %x}] ) [<{ATTRIBUTES}>] [({ REGION })] [{ATTRIBUTES}] : (TYPES) -> TYPES
    region     [^bb0( [%x : TYPE {, ...}] ) :] {op}
    attribute  KEY = VALUE          VALUE: 1, 0.5, true, "text", [1, 2], {a = 1}, none
    type       tensor<4x8xf32>, !lp.quant<...>, !lp.state, !torch.value, index        as runtime/ops/types.py says

`//` begins a comment. Every part knows its place, so that an error says FILE:line:column.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from runtime.errors import ParseError
from runtime.ops.types import DTYPE_NAMES, OpType, PlainType, QuantType, TensorType

Item = TypeVar("Item")


@dataclass(frozen=True)
class Attribute:
    """A plain value: int, float, bool, str, None, list or dict; and where it stands."""

    value: Any
    place: int


@dataclass(frozen=True)
class Value:
    """A use or a definition of an SSA value."""

    name: str
    place: int


@dataclass
class OpText:
    """One operation as written."""

    name: str
    place: int
    results: list[Value] = field(default_factory=list)
    operands: list[Value] = field(default_factory=list)
    attributes: dict[str, Attribute] = field(default_factory=dict)
    inputs: list[tuple[Value, OpType]] = field(default_factory=list)
    """Of the region: the arguments of its block."""
    body: "list[OpText] | None" = None
    operand_types: list[tuple[OpType, int]] = field(default_factory=list)
    result_types: list[tuple[OpType, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """A text and what it is called in errors."""

    text: str
    file: str

    def where(self, place: int) -> str:
        """`FILE:line:column` of an offset, both from 1."""
        line = self.text.count("\n", 0, place) + 1
        return f"{self.file}:{line}:{place - self.text.rfind(chr(10), 0, place)}"

    def fail(self, place: int, what: str, *, expected: str = "", got: str = "", hint: str = "") -> NoReturn:
        raise ParseError(what, where=self.where(place), expected=expected, got=got, hint=hint)


def read_op(source: Source) -> OpText:
    """The one operation that a file is. Raises ParseError."""
    reader = _Reader(source)
    op = reader.op()
    if reader.peek():
        reader.fail("the end of the file")
    return op


def write_op(op: OpText, indent: str = "") -> Iterator[str]:
    """The lines of an operation; places are not looked at."""
    results = ", ".join(f"%{each.name}" for each in op.results)
    head = f"{indent}{f'{results} = ' if results else ''}{write_string(op.name)}({_write_values(op.operands)})"
    attributes = write_attribute({key: each.value for key, each in op.attributes.items()}) if op.attributes else ""
    result_types = [str(each) for each, _ in op.result_types]
    to = result_types[0] if len(result_types) == 1 else f"({', '.join(result_types)})"
    tail = f" : ({', '.join(str(each) for each, _ in op.operand_types)}) -> {to}"
    if op.body is None:
        yield f"{head}{f' {attributes}' if attributes else ''}{tail}"
        return
    yield f"{head}{f' <{attributes}>' if attributes else ''} ({{"
    if op.inputs:
        yield f"{indent}^bb0({', '.join(f'%{value.name} : {kind}' for value, kind in op.inputs)}):"
    for each in op.body:
        yield from write_op(each, indent + "  ")
    yield f"{indent}}}){tail}"


def write_attribute(value: Any) -> str:
    """The text of a plain value. Raises TypeError for another."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case int() if -(2**63) <= value < 2**63:
            return str(value)
        case float() if "n" not in repr(value):  # inf and nan
            digits, exponent, power = repr(value).partition("e")
            return (digits if "." in digits else f"{digits}.0") + exponent + power
        case str():
            return write_string(value)
        case list():
            return f"[{', '.join(map(write_attribute, value))}]"
        case dict():
            items = (f"{_write_key(key)} = {write_attribute(each)}" for key, each in value.items())
            return f"{{{', '.join(items)}}}"
    raise TypeError(f"a {type(value).__name__}, {value!r}")


def write_string(text: str) -> str:
    return f'"{_ESCAPED.sub(_escape, text)}"'


def _write_values(values: list[Value]) -> str:
    return ", ".join(f"%{value.name}" for value in values)


def _write_key(key: str) -> str:
    return key if _KEY.fullmatch(key) else write_string(key)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    return f"\\{character}" if character in '"\\' else f"\\{ord(character):02X}"


class _Reader:
    """Recursive descent over the text; every method reads what it is named after."""

    def __init__(self, source: Source) -> None:
        self._source, self._text, self._place = source, source.text, 0
        self._depth = 0
        self._skip()

    def op(self) -> OpText:
        with self._nested():
            return self._op()

    @contextmanager
    def _nested(self) -> Iterator[None]:
        """One level further into regions, lists and dictionaries."""
        self._depth += 1
        if self._depth > _DEEPEST:
            self._source.fail(self._place, "too deeply nested", expected=f"at most {_DEEPEST} levels")
        yield
        self._depth -= 1

    def _op(self) -> OpText:
        results = []
        if self.peek() == "%":
            results = self._list(self._value)
            self._take("=")
        op = OpText(place=self._place, name=self._string("the name of an operation in quotes"), results=results)
        self._take("(")
        op.operands = [] if self.peek() == ")" else self._list(self._value)
        self._take(")")
        if self._has("<"):
            self._attributes(op)
            self._take(">")
        if self._has("("):
            self._region(op)
            self._take(")")
        if self.peek() == "{":
            self._attributes(op)
        self._take(":")
        op.operand_types = self._types()
        self._take("->")
        op.result_types = self._types() if self.peek() == "(" else [self._placed_type()]
        return op

    def peek(self) -> str:
        return self._text[self._place : self._place + 1]

    def fail(self, expected: str, place: int | None = None) -> NoReturn:
        place = self._place if place is None else place
        got = _WORD.match(self._text, place)
        self._source.fail(
            place, "cannot read this", expected=expected, got=got[0][:40] if got else "the end of the file"
        )

    def _region(self, op: OpText) -> None:
        self._take("{")
        if self._match(_BLOCK):
            self._take("(")
            op.inputs = [] if self.peek() == ")" else self._list(self._input)
            self._take(")")
            self._take(":")
        op.body = []
        while not self._has("}"):
            op.body.append(self.op())

    def _input(self) -> tuple[Value, OpType]:
        value = self._value()
        self._take(":")
        return value, self.type()

    def _value(self) -> Value:
        place = self._place
        if self.peek() != "%" or not (name := _VALUE_NAME.match(self._text, place + 1)):
            self.fail("a value, as %x")
        self._move(name.end())
        return Value(name[0], place)

    def _attributes(self, op: OpText) -> None:
        for key, place, value in self._entries():
            if key in op.attributes:
                self._source.fail(place, f"attribute {key} is there twice")
            op.attributes[key] = Attribute(value, place)

    def _entries(self) -> list[tuple[str, int, Any]]:
        self._take("{")
        entries = [] if self.peek() == "}" else self._list(self._entry)
        self._take("}")
        return entries

    def _entry(self) -> tuple[str, int, Any]:
        place = self._place
        key = self._string("a key") if self.peek() == '"' else self._word(_KEY, "a key")
        self._take("=")
        return key, place, self._plain()

    def _plain(self) -> Any:
        with self._nested():
            return self._plain_value()

    def _plain_value(self) -> Any:
        first, place = self.peek(), self._place
        if first == '"':
            return self._string("a string")
        if first == "[":
            self._take("[")
            items = [] if self.peek() == "]" else self._list(self._plain)
            self._take("]")
            return items
        if first == "{":
            entries = self._entries()
            if len({key for key, _, _ in entries}) < len(entries):
                self._source.fail(place, "a key is there twice")
            return {key: value for key, _, value in entries}
        if number := self._match(_NUMBER):
            is_float = any(mark in number for mark in ".e")
            if self._has(":"):
                self._word(_FLOAT_TYPE if is_float else _INT_TYPE, "f64" if is_float else "i64")
            return self._number(float(number), place) if is_float else self._integer(number, place)
        word = self._match(_KEY)
        if word not in _CONSTANTS:
            self.fail('an attribute: a number, true, "text", [...], {...} or none', place)
        return _CONSTANTS[word]

    def _integer(self, digits: str, place: int) -> int:
        largest = 2**63
        value = int(digits) if len(digits) < 24 else largest
        if not -largest <= value < largest:
            self._source.fail(place, "this integer is too large", expected="64 bits", got=digits[:24])
        return value

    def _number(self, value: float, place: int) -> float:
        if math.isinf(value):
            self._source.fail(place, "this number is too large", expected="64 bits")
        return value

    def _types(self) -> list[tuple[OpType, int]]:
        self._take("(")
        types = [] if self.peek() == ")" else self._list(self._placed_type)
        self._take(")")
        return types

    def _placed_type(self) -> tuple[OpType, int]:
        place = self._place
        return self.type(), place

    def type(self) -> OpType:
        place = self._place
        if tensor := _TENSOR.match(self._text, place):
            if tensor[2] not in _DTYPES:
                self.fail(f"an element type: {', '.join(_DTYPES)}", tensor.start(2))
            self._move(tensor.end())
            kind = TensorType(
                tuple(self._integer(size, place) for size in tensor[1].split("x")[:-1]), _DTYPES[tensor[2]]
            )
            if math.prod(size or 1 for size in kind.shape) * kind.dtype.itemsize >= 2**63:
                self._source.fail(place, "this tensor is too large", expected="fewer than 2^63 bytes", got=str(kind))
            return kind
        word = self._match(_TYPE_WORD)
        if word == "!lp.quant":
            return self._quant()
        if word not in _PLAIN_TYPES:
            self.fail(f"a type: tensor<...>, !lp.quant<...>, {', '.join(_PLAIN_TYPES)}", place)
        return _PLAIN_TYPES[word]

    def _quant(self) -> QuantType:
        self._take("<")
        format = self._string("a number format")
        self._take(",")
        granularity = self._string("a granularity")
        self._take(",")
        place, axis = self._place, self._plain()
        if not (axis is None or type(axis) is int):
            self.fail("an axis or none", place)
        self._take(",")
        place = self._place
        if self._text.startswith("!lp.quant", place):
            self.fail("the type of what holds the grid values")
        storage = self.type()
        assert not isinstance(storage, QuantType)
        self._take(">")
        return QuantType(format, granularity, axis, storage)

    def _string(self, expected: str) -> str:
        text = self._match(_STRING)
        if text is None:
            self.fail(expected)
        return _ESCAPE.sub(lambda match: _UNESCAPED.get(match[1]) or chr(int(match[1], 16)), text[1:-1])

    def _list(self, item: Callable[[], Item]) -> list[Item]:
        items = [item()]
        while self._has(","):
            items.append(item())
        return items

    def _word(self, pattern: re.Pattern[str], expected: str) -> str:
        found = self._match(pattern)
        if found is None:
            self.fail(expected)
        return found

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self._text, self._place)
        if found is None:
            return None
        self._move(found.end())
        return found[0]

    def _has(self, symbol: str) -> bool:
        has = self._text.startswith(symbol, self._place)
        if has:
            self._move(self._place + len(symbol))
        return has

    def _take(self, symbol: str) -> None:
        if not self._has(symbol):
            self.fail(f"`{symbol}`")

    def _move(self, place: int) -> None:
        self._place = place
        self._skip()

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self._place)
        self._place = found.end() if found else self._place


_DEEPEST = 64
"""Levels of nesting: a text of a program has 8, and Python recurses."""
_SPACE = re.compile(r"(?:\s+|//[^\n]*)*")
_WORD = re.compile(r'"(?:[^"\\\n]|\\.)*"|[\w.$%!#^-]+|[^\n]')
_VALUE_NAME = re.compile(r"[A-Za-z_0-9$.-]+")
_BLOCK = re.compile(r"\^[A-Za-z_0-9]+")
_KEY = re.compile(r"[A-Za-z_][A-Za-z_0-9$.]*")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?)?")
_INT_TYPE, _FLOAT_TYPE = re.compile("i64"), re.compile("f64")
_STRING = re.compile(r'"(?:[^"\\\n]|\\(?:["\\nt]|[0-9A-Fa-f]{2}))*"')
_ESCAPED = re.compile(r'["\\\x00-\x1f\x7f]')
_ESCAPE = re.compile(r'\\(["\\nt]|[0-9A-Fa-f]{2})')
_UNESCAPED = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}
_TENSOR = re.compile(r"tensor<((?:[0-9]+x)*)([A-Za-z][A-Za-z0-9]*(?:<\w+>)?)>")
_TYPE_WORD = re.compile(r"!?[A-Za-z][A-Za-z0-9_.]*")
_CONSTANTS = {"none": None, "true": True, "false": False}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_PLAIN_TYPES = {each.value: each for each in PlainType}
