"""What does not run as said is told unasked: one warning a compilation, and none where all is well."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lpcompile import lpcompile, report
from lpcompile.errors import LoweringError, LoweringWarning
from lpcompile.reporting.trouble import trouble_of

REFUSED = """
version: 1
name: refused
rules:
  - match: {name: "*"}
    fwd: {x: mxfp8, w: mxfp8}
"""
IDLE = """
version: 1
name: idle
rules:
  - match: {name: "nothing.*"}
    fwd: {x: e4m3}
"""


def _file(folder: Path, text: str) -> Path:
    file = folder / "policy.yaml"
    file.write_text(text)
    return file


def _convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 4))


def test_a_refused_convolution_is_told_with_its_reason(tmp_path: Path) -> None:
    file = _file(tmp_path, REFUSED)
    with pytest.warns(
        LoweringWarning, match=r"policy refused: \d of 6 named GEMMs .* not run as it says, first 0 "
    ) as told:
        model = lpcompile(_convolutional(), file)
    assert len(told) == 1
    assert told[0].filename == __file__, "it points at the caller"
    reason = next(row.reason for row in report(model).gemms if row.fidelity == "refused")
    assert reason in str(told[0].message)
    with pytest.raises(LoweringError):
        lpcompile(_convolutional(), file, strict=True)


def test_a_rule_that_matches_nothing_is_told(tmp_path: Path) -> None:
    with pytest.warns(LoweringWarning, match=r"1 thing is wrong, first .*nothing"):
        lpcompile(_convolutional(), _file(tmp_path, IDLE))


@pytest.mark.parametrize("policy", ["fp32", "fp32-emulated", "bf16", "hfp8", "fp8-rowwise", "int8", "fp16"])
def test_nothing_is_told_where_all_runs_as_said(policy: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpcompile(model, policy, (torch.randn(2, 8),))
    assert trouble_of(report(model)) == ""
