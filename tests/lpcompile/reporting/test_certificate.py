"""The certificate says the same as values, text, JSON and HTML, and a refusal is in all of them."""

import json
from pathlib import Path

import torch
from torch import nn

from lpcompile import lpcompile, report
from tests.models_for_tests import tiny_llama, token_batch

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


class HalfCalled(nn.Module):
    """`skipped` is a leaf whose weight is multiplied by an operation of the module, as Mamba's mixer does."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.skipped = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x) @ self.skipped.weight


def test_leaf_that_the_recorded_forward_never_called() -> None:
    model = lpcompile(HalfCalled(), "fp32-emulated", (torch.ones(2, 8),), strict=True)
    found = report(model)
    assert found.uncalled == ["skipped"]
    by_name = {row.name: row for row in found.gemms if row.role == "fwd"}
    assert by_name["skipped"].backend == "none"
    assert by_name["skipped"].fidelity == "not-called"
    assert by_name["skipped"].reason.startswith("not called by the recorded forward")
    assert by_name["called"].fidelity == by_name["matmul_0"].fidelity == "format-exact"
    text = found.to_text()
    assert "6 of 6 named GEMMs run so" in text
    assert "never called: skipped: not called by the recorded forward" in text
    assert found.by_backend()["none/not-called"] == 3

    unknown = report(lpcompile(HalfCalled(), "fp32-emulated"))
    assert unknown.uncalled == [], "no forward was recorded"
    assert {row.fidelity for row in unknown.gemms} == {"format-exact"}


def test_tied_head_and_leaves_of_opaque_modules_are_called() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    call = {**token_batch(), "use_cache": True}  # a cache among the arguments: attention is opaque
    found = report(lpcompile(model, "fp32-emulated", example_kwargs=call))
    assert found.opaque
    assert found.uncalled == []
