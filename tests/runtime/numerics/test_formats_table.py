"""The table of formats: the page in docs/ is what the rows say."""

from pathlib import Path

from runtime.numerics.block_formats import BLOCK_FORMATS
from runtime.numerics.formats import FORMATS, get_format
from runtime.numerics.formats_table import COLUMNS, number, scalar_cells, to_markdown

PAGE = Path(__file__).parents[3] / "docs" / "formats.md"


def test_the_page_is_up_to_date() -> None:
    command = "python -m runtime.numerics.formats_table > docs/formats.md"
    assert PAGE.read_text(encoding="utf-8") == to_markdown(), f"run: {command}"


def test_every_row_stands_in_it_with_all_its_cells() -> None:
    page = to_markdown()
    assert all(f"| {name} | " in page for name in (*FORMATS, *BLOCK_FORMATS))
    for line in page.splitlines():
        assert line.isascii()
        assert len(line) <= 300
    widths = {line.count("|") for line in page.splitlines() if line.startswith("| e4m3")}
    assert len(COLUMNS) + 1 in widths


def test_a_row_says_what_is_published() -> None:
    facts = dict(zip(COLUMNS, scalar_cells(get_format("e4m3"))))
    assert [facts[key] for key in COLUMNS[1:9]] == ["1-4-3", "7", "448", "2^-6", "2^-9", "254", "2^-3", "NaN"]
    dlfloat = dict(zip(COLUMNS, scalar_cells(get_format("dlfloat16"))))
    assert [dlfloat["max"], dlfloat["min normal"], dlfloat["min subnormal"]] == ["8573157376", "4.665708e-10", ""]
    assert [number(v) for v in (2.0**127, -(2.0**-3), 0.3, 57344.0)] == ["2^127", "-2^-3", "0.3", "57344"]
