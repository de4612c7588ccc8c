"""docs/ir.md: its tables are those of the declarations, and its example is what the pass does."""

import re
from pathlib import Path

from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.ir.reference import tables
from passes.ir.structure import STRUCTURES
from runtime.ops.dialect import OPS
from tests.passes.golden import run
from tests.passes.ir.xdsl_dialect import LP, TORCH, verify_text

PAGE = (Path(__file__).parents[3] / "docs" / "ir.md").read_text()


def test_the_tables_are_up_to_date() -> None:
    begin, end = "<!-- begin: python -m passes.ir.reference -->\n\n", "\n\n<!-- end -->"
    assert PAGE.partition(begin)[2].partition(end)[0] == tables(), (
        "python -m passes.ir.reference prints what belongs there"
    )


def test_the_example_is_what_insert_casts_does() -> None:
    before, after = re.findall(r"```mlir\n(.*?)```", PAGE, re.S)
    assert run(before, "insert-casts") == after
    for text in (before, after):
        assert print_program(parse_program(text)) == text
        verify_text(text)


def test_the_dialects_have_every_declared_operation_and_no_other() -> None:
    names = {op.name for dialect in (LP, TORCH) for op in dialect.operations}
    assert names == {*OPS, *STRUCTURES} - {"builtin.module"}
