"""Trouble: what of a compiled model does not run as its policy says, in one line, told unasked."""

import warnings
from typing import TYPE_CHECKING

from torch import nn

from lpcompile.errors import LoweringWarning
from lpcompile.reporting.certificate import report

if TYPE_CHECKING:
    from lpcompile.reporting.certificate import Report


def trouble_of(report: "Report") -> str:
    """The counts, the first reason and what to try; "" where every named GEMM runs as said and no check is wrong.

    policy p: 3 of 6 named GEMMs do not run as it says, first 0 fwd: <reason>. 1 thing is wrong, first <finding>
    """
    refused = [row for row in report.gemms if not row.runs_as_policy_says]
    wrong = [finding for finding in report.warnings if finding.is_wrong]
    parts = []
    if refused:
        first = refused[0]
        parts.append(
            f"{len(refused)} of {len(report.called)} named GEMMs {'does' if len(refused) == 1 else 'do'} not run as it "
            f"says, first {first.name} {first.role}: {first.reason}"
        )
    if wrong:
        parts.append(f"{len(wrong)} {'thing is' if len(wrong) == 1 else 'things are'} wrong, first {wrong[0]}")
    return f"policy {report.policy}: " + ". ".join(part.rstrip(".") for part in parts) if parts else ""


def tell_trouble(model: nn.Module, stacklevel: int) -> None:
    """Warn of it, once a compilation."""
    if trouble := trouble_of(report(model)):
        warnings.warn(f"{trouble}. Try print(report(model).to_text())", LoweringWarning, stacklevel=stacklevel + 1)
