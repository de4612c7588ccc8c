"""The certificate says the same as values, text, JSON and HTML, and a refusal is in all of them."""

import json
from pathlib import Path

from torch import nn

from lpcompile import lpcompile, report

POLICY = """
version: 1
name: odd
rules:
  - match: {name: "0"}
    fwd: {x: {format: e4m3, scale: {granularity: column}}, w: e4m3}
  - match: {name: "1"}
    fwd: {x: e4m3, w: e4m3, accumulate: {format: dlfloat16, chunk: 64}}
  - match: {name: "nothing"}
    fwd: {x: e4m3}
"""


def _report(folder: Path):  # type: ignore[no-untyped-def]
    file = folder / "odd.yaml"
    file.write_text(POLICY)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    return report(lpcompile(model, file))


def test_values(tmp_path: Path) -> None:
    found = _report(tmp_path)
    assert {(row.name, row.role) for row in found.gemms} == {(n, r) for n in "01" for r in ("fwd", "bwd", "grad")}
    assert [row.fidelity for row in found.gemms if row.name == "0"] == ["refused"] * 3
    (summed,) = (row for row in found.gemms if (row.name, row.role) == ("1", "fwd"))
    assert (summed.fidelity, summed.accumulate) == ("emulated", "dlfloat16/64")
    assert found.left_alone == ["2"]
    assert "odd.yaml" in found.unmatched_rules[0]
    assert sum(found.by_backend().values()) == len(found.gemms)


def test_text(tmp_path: Path) -> None:
    text = _report(tmp_path).to_text()
    assert "3 of 6 named GEMMs run so" in text
    assert "use granularity row, or rule pow2" in text
    assert "left alone: 2" in text
    assert "warning: " in text


def test_json_holds_every_row(tmp_path: Path) -> None:
    found = _report(tmp_path)
    told = json.loads(found.to_json())
    assert [row["reason"] for row in told["gemms"]] == [row.reason for row in found.gemms]


def test_html_is_one_page_with_every_row_escaped(tmp_path: Path) -> None:
    found = _report(tmp_path)
    page = found.to_html(tmp_path / "c.html").read_text(encoding="utf-8")
    assert page.count("<tr") == 1 + len(found.gemms)
    assert page.count('<tr class="refused">') == 3
    assert "<script" not in page
    assert "&lt;= (K-1)" in page, "reasons hold <= signs"
