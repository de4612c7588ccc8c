"""Page: the certificate as one self-contained HTML file, to sort, filter and fold by module. The table is drawn by the
page's own script from the rows as JSON; without a script the text of the certificate is there.
"""

import html
import json
import re
from collections import Counter
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from lpcompile.reporting.rows import FIDELITIES
from lpcompile.reporting.text import headline, print_report

if TYPE_CHECKING:
    from lpcompile.reporting.certificate import Report

COLUMNS = ("name", "op", "role", "lhs", "rhs", "accumulate", "out", "backend", "fidelity", "counts", "reason", "rule")


def make_page(report: "Report") -> str:
    """The page as text. Everything from the model or the policy is escaped."""
    template = Template(files("lpcompile.reporting").joinpath("page.html").read_text(encoding="utf-8"))
    data = without_folders(json.dumps(_data(report), separators=(",", ":"))).replace("<", "\\u003c")
    return template.substitute(
        title=html.escape(f"{report.policy}: lowering certificate"),
        data=data,
        text=html.escape(without_folders(print_report(report))),
    )


def without_folders(text: str) -> str:
    """Policy files by their names: a page that is handed on says nothing of the machine it was made on."""
    return re.sub(r"(?<![\w.])/(?:[^\s/\"\\]+/)*([^\s/\"\\]+\.ya?ml)", r"\1", text)


def _data(report: "Report") -> dict[str, Any]:
    """Rows as indices into the strings, since a model of 80 layers says everything 80 times."""
    places: dict[str, int] = {}
    rows = [[places.setdefault(str(getattr(row, column)), len(places)) for column in COLUMNS] for row in report.gemms]
    return {
        "headline": headline(report),
        "columns": COLUMNS,
        "fidelities": FIDELITIES,
        "strings": list(places),
        "rows": rows,
        "shares": _shares(report),
        "notes": _notes(report),
    }


def _shares(report: "Report") -> list[tuple[str, dict[str, float]]]:
    called = report.called
    counts = Counter(row.fidelity for row in called)
    shares = [("of the GEMMs", {each: count / len(called) for each, count in counts.items()})]
    flops = {each: report.share_of_flops(each) for each in counts}
    known = {each: share for each, share in flops.items() if share is not None}
    return [*shares, ("of the FLOPs", known)] if known else shares


def _notes(report: "Report") -> list[tuple[str, list[str]]]:
    return [
        ("warnings", [str(finding) for finding in report.warnings]),
        ("left alone", report.left_alone),
        ("not reached", [f"{path}: {reason}" for path, reason in report.unreached.items()]),
        ("never called", [f"{name}: {reason}" for name, reason in report.uncalled.items()]),
        ("not seen", [f"{path}: {reason}" for path, reason in report.unseen.items()]),
        ("passes", report.passes),
        ("joint", [report.joint] if report.joint else []),
    ]
