"""The pass manager: runs passes in order, verifies before, between and after, and keeps times and counts.

A pass is a frozen dataclass of options with a `name` and `run(program) -> changed`. Its options print and parse:
`place-regions{carriers=drop,finite=false}`.
"""

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.conditions import check_conditions
from passes.ir.program import Program
from passes.ir.verifier import verify
from runtime.errors import PassError, nearest_names


class Pass(ABC):
    """Graph in, graph out. Subclasses are frozen dataclasses; their fields are their options, all of type str, int or
    bool.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    """Conditions of passes/conditions.py that must hold before it runs."""

    @abstractmethod
    def run(self, program: Program) -> bool:
        """Rewrite the program in place; True if anything changed. The program verifies before and after, and need not
        in between.
        """

    def __str__(self) -> str:
        options = ",".join(f"{f.name}={_print(getattr(self, f.name))}" for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{self.name}{{{options}}}" if options else self.name


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: wall seconds, and nodes in all graphs before and after."""

    name: str
    seconds: float
    changed: bool
    nodes_before: int
    nodes_after: int


def run_passes(
    program: Program, passes: Sequence[Pass], after_each: Callable[[Pass, Program], None] | None = None
) -> list[PassRecord]:
    """Run `passes` in order on `program`, which is verified before the first and after each that changed it.
    `after_each` sees the program after each pass (to print it, say).
    """
    verify(program)
    records = []
    for each in passes:
        check_conditions(program, each.name, each.requires)
        before, start = program.num_nodes(), time.perf_counter()
        changed = each.run(program)
        seconds = time.perf_counter() - start
        after = program.num_nodes()
        if changed or after != before:
            verify(program)
        program.passes.append(str(each))
        records.append(PassRecord(str(each), seconds, changed, before, after))
        if after_each:
            after_each(each, program)
    return records


def parse_passes(text: str, known: dict[str, type[Pass]]) -> list[Pass]:
    """`a,b{option=1,other=x}` -> passes. Raises PassError on an unknown pass or option, and on what is no such list."""
    found = []
    for number, item in enumerate(split_items(text), 1):
        name, _, options = (part.strip() for part in item.partition("{"))
        if name not in known:
            raise PassError(
                f'"{name}" is not a pass',
                where=f"passes, item {number}",
                expected="the name of a pass",
                got=f'"{name}"',
                hint=nearest_names(name, tuple(known)),
            )
        found.append(_build(known[name], options.removesuffix("}")))
    return found


def _build(kind: type[Pass], options: str) -> Pass:
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    defaults = ",".join(f"{name}={_print(f.default)}" for name, f in fields.items())
    for option in options.split(",") if options.strip() else ():
        key, equals, value = (part.strip() for part in option.partition("="))
        got = f'"{option.strip()}"'
        if not equals:
            what, expected = "an option without value", "option=value"
            raise PassError(what, where=kind.name, expected=expected, got=got, hint=defaults or kind.name)
        if key not in fields:
            hint = nearest_names(key, tuple(fields)) if fields else kind.name
            what, expected = f'it has no option "{key}"', ", ".join(fields) or "no options"
            raise PassError(what, where=kind.name, expected=expected, got=got, hint=hint)
        if key in values:
            what, expected = f'the option "{key}" is there twice', "each option once"
            raise PassError(what, where=kind.name, expected=expected, got=got, hint="one of the two")
        values[key] = _parse(value, fields[key].default, kind.name, key)
    try:
        return kind(**values)
    except PassError as error:
        hint = error.hint or str(kind())
        raise PassError(error.what, where=error.where, expected=error.expected, got=error.got, hint=hint) from error


def split_items(text: str) -> list[str]:
    """The passes of a text: at commas outside braces. Raises PassError where it is no list of them."""
    items, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    items = [item.strip() for item in items]
    if items == [""]:
        return []
    for number, item in enumerate(items, 1):
        opened, closed = item.count("{"), item.count("}")
        name, _, rest = item.partition("{")
        inside, _, after = rest.partition("}")
        what, hint = "", f"{name.partition('}')[0]}{{{inside}}}" if opened else name.partition("}")[0]
        if not item:
            what, hint = "no pass between two commas", ",".join(filter(None, items)) or '""'
        elif opened > closed:
            what = "a brace is not closed"
        elif opened > 1 or closed > opened:
            what = "a brace too much"
        elif after:
            what, hint = "there is more after the brace", f"{hint},{after}"
        if what:
            where, expected = f"passes, item {number}", "NAME or NAME{option=value,...}"
            raise PassError(what, where=where, expected=expected, got=item or text, hint=hint)
    return items


def _print(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse(text: str, default: Any, owner: str, key: str) -> Any:
    """A value of the default's kind."""
    where, hint = f"{owner}{{{key}}}", f"{key}={_print(default)}"
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise PassError("not a truth value", where=where, expected="true or false", got=text, hint=hint)
        return text == "true"
    try:
        return type(default)(text)
    except ValueError as error:
        expected = "a whole number" if isinstance(default, int) else "a number"
        raise PassError("not a number of this kind", where=where, expected=expected, got=text, hint=hint) from error
