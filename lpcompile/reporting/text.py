"""Text: the certificate as a person reads it. What does not run comes first; layers that run alike are one line.

policy hfp8 (1f0c...): 141 of 147 named GEMMs run so; 1 site is not named and left alone
  format-exact   141  95.9 % of the GEMMs, 99.2 % of the FLOPs of layers with weights
  refused          6   4.1 %, 0.8 %
does not run as the policy says:
  model.layers.{0,1}.mlp.gate  fwd bwd grad  6 x  the reason, and what to try
runs:
  model.layers.{0..15}.mlp.up_proj  fwd  16 x  e4m3 * e4m3 -> fp32 -> fp32  cpu  format-exact  [1]
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lpcompile.reporting.grouping import fold_names
from lpcompile.reporting.rows import FIDELITIES, UNCALLED, GemmRow
from runtime.numerics.specs import ROLES

if TYPE_CHECKING:
    from lpcompile.reporting.certificate import Report

_COUNTS = ("calls_as_said", "new_calls", "new_calls_as_said")
COLUMNS = ("name", "role", "lhs", "rhs", "accumulate", "out", "backend", "fidelity")
"""Of a row, in a table with a line per GEMM."""


def print_report(report: "Report", full: bool = False) -> str:
    """The whole certificate; `full` for a line per GEMM in place of a line per group."""
    lines = [headline(report), *_shares(report)]
    if calls := sum(row.calls for row in report.gemms):
        so, new, new_so = (sum(getattr(row, each) for row in report.gemms) for each in _COUNTS)
        lines.append(
            f"calls in eager code since compiling: {so} of {calls} ran so; since the last report: {new_so} of {new}"
        )
    if not report.captured:
        lines.append("no example inputs were given: products of activations are found when they run")
    refused = [row for row in report.gemms if not row.runs_as_policy_says]
    if refused:
        lines += ["does not run as the policy says:", *_refusals(refused)]
    lines += [f"warning: {finding}" for finding in report.warnings]
    lines += _remarks(report)
    running = [row for row in report.gemms if row.runs_as_policy_says]
    if full:
        lines += table(report.gemms)
    elif running:
        lines += ["runs:", *_groups(running)]
    return "\n".join(lines)


def headline(report: "Report") -> str:
    """One sentence with the counts."""
    called = report.called
    running = sum(row.runs_as_policy_says for row in called)
    num_left = len(report.left_alone)
    left = f"{num_left} {'site is' if num_left == 1 else 'sites are'} not named and left alone"
    return f"policy {report.policy} ({report.policy_hash[:12]}): {running} of {len(called)} named GEMMs run so; {left}"


def table(rows: Sequence[GemmRow]) -> list[str]:
    """A line per GEMM, in columns."""
    widths = [max((len(str(getattr(row, column))) for row in rows), default=0) for column in COLUMNS]
    lines = []
    for row in rows:
        cells = [str(getattr(row, column)).ljust(width) for column, width in zip(COLUMNS, widths)]
        lines.append("  ".join(cells) + "".join(f"  {each}" for each in (row.counts, row.reason) if each))
    return lines


def _shares(report: "Report") -> Iterable[str]:
    called = report.called
    counts = Counter(row.fidelity for row in called)
    is_first = True
    for fidelity in FIDELITIES:
        if not counts[fidelity]:
            continue
        line = f"  {fidelity:<13} {counts[fidelity]:>5}  {counts[fidelity] / len(called):.1%} of the GEMMs"
        share = report.share_of_flops(fidelity)
        if share is not None:
            line += f", {share:.1%} of the FLOPs" + (" of layers with weights" if is_first else "")
        is_first = False
        yield line


def _refusals(rows: Sequence[GemmRow]) -> Iterable[str]:
    """A line per reason and group of sites, the roles of a site together."""
    roles: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        roles[row.name, row.reason].append(row.role)
    sites: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (name, reason), which in roles.items():
        sites[reason, tuple(which)].append(name)
    for (reason, said), names in sites.items():
        for name, count in fold_names(names):
            yield f"  {name}  {' '.join(said)}  {count * len(said)} x  {reason}"


def _remarks(report: "Report") -> list[str]:
    lines = [f"left alone: {name}" + _times(count) for name, count in fold_names(report.left_alone)]
    lines += [f"not reached: {path}: {reason}" for path, reason in report.unreached.items()]
    lines += [f"never called: {name}: {reason}" for name, reason in report.uncalled.items()]
    for reason in dict.fromkeys(report.unseen.values()):
        paths = [path for path, said in report.unseen.items() if said == reason]
        lines += [f"not seen: {path}{_times(count)}: {reason}" for path, count in fold_names(paths)]
    lines += [f"not by the graph: {report.unserved}"] if report.unserved else []
    lines.append(
        f"casts in a forward pass: {report.num_quantize_before} before sharing, {report.num_quantize_after} after"
    )
    if report.kept_per_row:
        lines.append(f"kept for backward: {report.kept_per_row:,.0f} bytes by a row of input of the linear layers")
    if report.kept is not None:
        lines.append(f"kept for backward by the last calls in eager code: {report.kept:,} bytes")
    lines += [each for each in (report.observed, report.joint) if each]
    kept = f"{report.num_kept_casts} kept, {report.kept_bytes} bytes"
    lines.append(f"casts of weights: {f'none kept: {report.why_none_kept}' if report.why_none_kept else kept}")
    return lines


def _groups(rows: Sequence[GemmRow]) -> Iterable[str]:
    """A line per group of sites that run alike; what is to be said of a backend stands once, below."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        alike[row.role, row.formula, row.backend, row.fidelity, row.reason].append(row.name)
    notes: dict[str, int] = {}
    lines: list[tuple[str, ...]] = []
    for (role, formula, backend, fidelity, reason), names in alike.items():
        number = f"[{notes.setdefault(reason, len(notes) + 1)}]" if reason else ""
        how = "not called" if fidelity == UNCALLED else f"{backend}  {fidelity}"
        for name, count in fold_names(names):
            lines.append((name, role, f"{count} x", formula, f"{how}  {number}"))
    order = {line[0]: place for place, line in reversed(list(enumerate(lines)))}
    lines.sort(key=lambda line: (order[line[0]], ROLES.index(line[1])))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0])).rstrip()
    for reason, place in notes.items():
        yield f"  [{place}] {reason}"


def _times(count: int) -> str:
    return f" ({count} x)" if count > 1 else ""
