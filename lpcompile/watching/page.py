"""Page: what was measured as one self-contained HTML file: a heat map, what loses most, the formats that did not run,
the history, and the suggested policy. Nothing is loaded and no script runs.
"""

import html
import math
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from lpcompile.reporting.page import without_folders
from lpcompile.watching.figures import bars, heat_map, line_plot
from lpcompile.watching.results import Gemm, Operand, Results
from lpcompile.watching.suggestion import Suggestion
from lpcompile.watching.text import decibel, headline, loser, percent
from lpcompile.watching.watcher import SMALLEST_EXPONENT
from runtime.numerics.formats import get_format
from runtime.numerics.specs import QuantSpec, Role

_ROLES: tuple[tuple[Role, str], ...] = (("fwd", "FWD y = x.w"), ("bwd", "BWD dx = dy.w"), ("grad", "GRAD dw = dy.x"))
_MOST_ROWS = 40
_MOST_LINES = 8
_MOST_BARS = 6


def make_page(results: Results, suggestion: Suggestion) -> str:
    """The page as text. Everything from the model or the policy is escaped."""
    template = Template(files("lpcompile.watching").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(f"{results.policy.name}: what precision does"),
        headline=html.escape(headline(results)),
        operands=_operand_map(results),
        ranking=_ranking(results),
        candidates="".join(_candidate_map(results, role, title) for role, title in _ROLES),
        history=_history(results),
        spread=_spread(results),
        policy=html.escape(without_folders(suggestion.to_yaml())),
    )


def _operand_map(results: Results) -> str:
    sites = list(dict.fromkeys(gemm.site for gemm in results.gemms))
    found = {(gemm.site, gemm.role): gemm for gemm in results.gemms}
    columns = [(role, side) for role, _ in _ROLES for side in (0, 1)]
    values: list[list[float | None]] = []
    notes: list[list[str]] = []
    for site in sites:
        operands = [found[site, role].operands[side] if (site, role) in found else None for role, side in columns]
        values.append([None if each is None else each.sqnr_db for each in operands])
        notes.append(["" if each is None else _note(site, role, each) for (role, _), each in zip(columns, operands)])
    names = ["fwd x", "fwd w", "bwd dy", "bwd w", "grad dy", "grad x"]
    return heat_map([site or "(root)" for site in sites], names, values, notes)


def _note(site: str, role: str, operand: Operand) -> str:
    error = operand.error
    shares = ", ".join(
        f"{percent(error.share(name))} {name}" for name in ("underflow", "overflow", "saturated") if error.share(name)
    )
    return f"{site} {role} {operand.name}: {operand.cast}, amax {operand.largest:.3g}" + (
        f", {shares}" if shares else ""
    )


def _ranking(results: Results) -> str:
    head = ["", "GEMM", "role", "SQNR dB", "loses by", "cast", "amax", "underflow", "overflow", "at max", "rel. error"]
    rows = []
    for number, gemm in enumerate(results.ranking[:_MOST_ROWS], 1):
        worst = loser(gemm)
        error = worst.error
        relative = "" if error.mean_relative is None else f"{error.mean_relative:.3f}"
        shares = [percent(error.share(name)) for name in ("underflow", "overflow", "saturated")]
        rows.append([str(number), gemm.site or "(root)", gemm.role, decibel(gemm.sqnr_db), worst.name, worst.cast,
                     f"{worst.largest:.3g}", *shares, relative])  # fmt: skip
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"


def _candidate_map(results: Results, role: Role, title: str) -> str:
    gemms = [gemm for gemm in results.gemms if gemm.role == role]
    if not gemms:
        return ""
    columns = ["as it ran", *results.candidates]
    values = [[gemm.sqnr_db, *(gemm.sqnr_under(name) for name in results.candidates)] for gemm in gemms]
    notes = [[f"{gemm.site} {role} under {name}" for name in columns] for gemm in gemms]
    return f"<h3>{title}</h3>" + heat_map([gemm.site or "(root)" for gemm in gemms], columns, values, notes)


def _worst_operands(results: Results, most: int) -> list[tuple[Gemm, Operand]]:
    return [(gemm, loser(gemm)) for gemm in results.ranking[:most]]


def _history(results: Results) -> str:
    steps = [step.step for step in results.steps]
    if len(steps) < 2:
        return "<p class=dim>One step was looked at: there is no history yet.</p>"
    worst = _worst_operands(results, _MOST_LINES)
    keys = [
        (f"{gemm.site} {gemm.role} {operand.name}", (gemm.site, gemm.role, operand.name)) for gemm, operand in worst
    ]
    sqnr = [(name, [_shown(step.sqnr_db.get(key)) for step in results.steps]) for name, key in keys]
    size = [(name, [_log2(step.largest.get(key)) for step in results.steps]) for name, key in keys]
    return f"<h3>SQNR</h3>{line_plot(steps, sqnr, 'dB')}<h3>Largest magnitude</h3>{line_plot(steps, size, 'log2')}"


def _shown(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _log2(value: float | None) -> float | None:
    return math.log2(value) if value and math.isfinite(value) else None


def _spread(results: Results) -> str:
    """Of the tensors that lose most, where their values lie and what their format holds without a scale."""
    drawn: dict[tuple[str, str], str] = {}
    for gemm, operand in _worst_operands(results, len(results.ranking)):
        at = gemm.site, operand.name
        counts = results.steps[-1].exponents.get(at)
        if at in drawn or counts is None:
            continue
        spec = QuantSpec.parse(operand.cast)
        marks: list[tuple[float, str]] = []
        if spec.is_elementwise and spec.scale is None and not spec.is_identity:
            row = get_format(spec.format)
            marks = [(math.log2(row.tiny), "smallest"), (math.log2(row.max), "largest")]
        drawn[at] = bars(f"{gemm.site} {operand.name}, {spec.format}", counts, SMALLEST_EXPONENT, marks)
        if len(drawn) == _MOST_BARS:
            break
    return "".join(drawn.values())
