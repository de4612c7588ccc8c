"""Reference: the tables of docs/ir.md, made from the declarations. `python -m passes.ir.reference` prints them.

A test compares the page with what this file makes.
"""

import inspect
from collections.abc import Sequence

from passes.ir.program import NODE_META
from passes.ir.structure import STRUCTURES
from runtime.ops.declared import OpDef
from runtime.ops.dialect import OPS


def tables() -> str:
    """Markdown: the lp ops, what holds of each, the other operations, and the keys of a node's meta."""
    return "\n\n".join((_ops(), _rules(), _structures(), _meta()))


def _ops() -> str:
    rows = [
        (
            f"`{op.name}`",
            ", ".join(f"`{operand}` {operand.kind}" for operand in op.operands),
            ", ".join(f"`{attribute}` {attribute.kind.__name__}" for attribute in op.attributes),
            _sentence(op),
        )
        for op in OPS.values()
    ]
    return _table(("op", "operands", "attributes", "computes"), rows)


def _rules() -> str:
    lines = []
    for op in OPS.values():
        sentences = [rule.sentence for rule in op.rules] + [rule.sentence for rule in op.type_rules]
        lines += [f"- `{op.name}`: {sentence}." for sentence in sentences]
    return "\n".join(lines)


def _structures() -> str:
    rows = [
        (
            f"`{each.name}`",
            ", ".join(
                f"`{name}{mark}` {kind.__name__}"
                for mark, kinds in (("", each.attributes), ("?", each.optional))
                for name, kind in kinds.items()
            ),
            each.does,
        )
        for each in STRUCTURES.values()
    ]
    return _table(("operation", "attributes", "stands for"), rows)


def _meta() -> str:
    rows = [(f"`lp.{key.removeprefix('lp_')}`", kind.__name__) for key, kind in NODE_META.items()]
    return _table(("attribute of any node", "type"), rows)


def _sentence(op: OpDef) -> str:
    return " ".join((inspect.getdoc(op.run) or "").partition("\n\n")[0].split())


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    print(tables())
