"""The pass manager: runs passes in order, verifies before, between and after, and keeps times and counts.

A pass is a frozen dataclass of options with a `name` and `run(program) -> changed`. Its options print and parse:
`share-casts{across=modules}`.
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
    """`a,b{option=1,other=x}` -> passes. Raises PassError on an unknown pass or option."""
    found = []
    for item in split_items(text):
        name, _, options = item.partition("{")
        if name not in known:
            raise PassError(f'"{name}" is not a pass', hint=nearest_names(name, tuple(known)))
        found.append(_build(known[name], options.rstrip("}")))
    return found


def _build(kind: type[Pass], options: str) -> Pass:
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in fields:
            raise PassError(f'{kind.name} has no option "{key}"', hint=nearest_names(key, tuple(fields)))
        values[key] = _parse(value, type(fields[key].default), f"{kind.name}{{{key}}}")
    return kind(**values)


def split_items(text: str) -> list[str]:
    """The passes of a text: at commas outside braces."""
    items, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def _print(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse(text: str, kind: type, where: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise PassError("not a truth value", where=where, expected="true or false", got=text)
        return text == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise PassError(f"not a {kind.__name__}", where=where, got=text) from error
