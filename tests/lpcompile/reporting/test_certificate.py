"""The certificate says the same as values, text, JSON and HTML, and a refusal is in all of them."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from lpcompile import Policy, advance, lpcompile, report
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
    found = _report(tmp_path)
    text = found.to_text()
    assert text.splitlines()[0] == found.to_text(full=True).splitlines()[0]
    assert re.search(r"refused +3  50\.0% of the GEMMs, 50\.0% of the FLOPs", text)
    assert text.index("does not run as the policy says") < text.index("runs:")
    assert "  0  fwd bwd grad  3 x  " in text
    assert "3 of 6 named GEMMs run so" in text
    assert "use granularity row, or rule pow2" in text
    assert "left alone: 2" in text
    assert "warning: " in text


def test_json_holds_every_row(tmp_path: Path) -> None:
    found = _report(tmp_path)
    told = json.loads(found.to_json())
    assert [row["reason"] for row in told["gemms"]] == [row.reason for row in found.gemms]


def test_html_holds_every_row_escaped_and_no_folder(tmp_path: Path) -> None:
    found = _report(tmp_path)
    page = found.to_html(tmp_path / "c.html").read_text(encoding="utf-8")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    fidelity = data["columns"].index("fidelity")
    assert [data["strings"][row[fidelity]] for row in data["rows"]] == [row.fidelity for row in found.gemms]
    assert "|error| &lt;= " in page, "reasons hold <= signs"
    assert str(tmp_path) not in page
    assert "odd.yaml:" in page
    assert not re.search(r"(src|href)=", page), "it is one file"


def test_html_of_hostile_names_runs_nothing(tmp_path: Path) -> None:
    name = "</script><script>document.title='ran'</script>"
    file = tmp_path / "odd.yaml"
    file.write_text(POLICY)
    model = nn.Sequential(nn.Linear(8, 8))
    model.add_module("<b>", nn.Linear(8, 8))
    found = report(lpcompile(model, file))
    found = dataclasses.replace(found, policy=name, left_alone=[name])
    page = found.to_html(tmp_path / "c.html").read_text(encoding="utf-8")
    assert name not in page
    assert page.count("</script>") == 2


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed")
def test_html_draws_its_table_in_a_browser(tmp_path: Path) -> None:
    found = _report(tmp_path)
    page = found.to_html(tmp_path / "c.html")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert drawn.count('<tr class="gemm refused">') == 3
    assert drawn.count('<tr class="gemm ') == len(found.gemms)
    assert "6 of 6 GEMMs" in drawn


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
    assert list(found.uncalled) == ["skipped"]
    by_name = {row.name: row for row in found.gemms if row.role == "fwd"}
    assert by_name["skipped"].backend == "none"
    assert by_name["skipped"].fidelity == "not-called"
    assert by_name["skipped"].reason.startswith("not called by the example forward")
    assert by_name["called"].fidelity == by_name["matmul_0"].fidelity == "format-exact"
    text = found.to_text()
    assert "6 of 6 named GEMMs run so" in text
    assert "never called: skipped: not called by the example forward" in text
    assert found.by_backend()["none/not-called"] == 3

    unknown = report(lpcompile(HalfCalled(), "fp32-emulated"))
    assert unknown.uncalled == {}, "no forward was recorded"
    assert {row.fidelity for row in unknown.gemms} == {"format-exact"}


def test_tied_head_and_leaves_under_a_cache_are_called() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    call = {**token_batch(), "use_cache": True}
    found = report(lpcompile(model, "fp32-emulated", example_kwargs=call))
    assert found.uncalled == {}


def test_text_of_many_layers_is_short() -> None:
    layers = [nn.ModuleDict({"up_proj": nn.Linear(8, 8), "down_proj": nn.Linear(8, 8)}) for _ in range(32)]
    found = report(lpcompile(nn.ModuleDict({"layers": nn.ModuleList(layers)}), "fp8-rowwise"))
    lines = found.to_text().splitlines()
    assert len(lines) < 20
    assert any("layers.{0..31}.up_proj" in line and " 32 x " in line for line in lines)
    assert len(found.to_text(full=True).splitlines()) > 3 * 2 * 32


def test_warnings_are_of_every_phase_of_a_schedule() -> None:
    idle = {"match": {"name": "nothing.*"}, "fwd": {"x": "bf16"}}
    rules = {"fwd": {"x": "e4m3"}}, idle
    warm = {"name": "warm", "rules": [{"fwd": {"x": "bf16"}}]}
    schedule = [{"from_step": 0, "policy": warm}, {"from_step": 5}]
    policy = Policy.model_validate({"name": "two", "rules": rules, "schedule": schedule})
    model = lpcompile(nn.Sequential(nn.Linear(4, 4)), policy)
    for step in (0, 5):
        advance(model, to_step=step)
        assert [finding.code for finding in report(model).warnings] == ["rule-matches-nothing"]
        assert len(report(model).unmatched_rules) == 1


@pytest.mark.parametrize("layer", [torch.nn.Linear(8, 8), torch.nn.Conv2d(3, 3, 3), torch.nn.LSTM(4, 4)])
def test_a_model_that_is_one_layer(layer: torch.nn.Module, tmp_path: Path) -> None:
    found = report(lpcompile(layer, "int8"))
    assert found.to_text().startswith("policy int8 ")
    assert found.to_json()
    found.to_html(tmp_path / "one.html")
