"""The lowering certificate: for every GEMM and role what it runs as, how exactly, or why not; as values, text, JSON
and HTML.
"""

import dataclasses
import html
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lpcompile.compiled import Compiled, get_compiled
from lpcompile.frontends.install import CapturedForward, captured
from passes.finding import Finding
from passes.ir.program import num_op
from runtime.numerics.specs import ROLES, LayerSpec, Role


@dataclass(frozen=True)
class GemmRow:
    """One GEMM of one site. lhs and rhs print as casts, `FORMAT ROUNDING [GRANULARITY/RULE]`."""

    name: str
    op: str
    role: Role
    lhs: str
    rhs: str
    accumulate: str
    out: str
    backend: str
    fidelity: str
    reason: str
    rule: str
    """The policy's rule that decided it, and what a pass chose where the rule leaves it open."""

    @property
    def runs_as_policy_says(self) -> bool:
        """False if it runs otherwise. What the recorded forward never called runs in no way, and is counted apart."""
        return self.fidelity != "refused"


@dataclass(frozen=True)
class Report:
    """What lpcompile did to a model under the phase of the schedule in force."""

    policy: str
    policy_hash: str
    gemms: list[GemmRow]
    left_alone: list[str]
    """GEMM sites that no rule names: they run as the uncompiled model does."""
    unmatched_rules: list[str]
    warnings: list[Finding]
    """What the checks of the policy against the model found, rules that match nothing among it."""
    unreached: dict[str, str]
    """Modules whose GEMMs no graph shows, with the reason."""
    opaque: dict[str, str]
    """Modules that could not be recorded, with the reason; their leaves are compiled all the same."""
    uncalled: list[str]
    """Sites of leaves that the recorded forward never called: their weights may be used by other operations."""
    guard_misses: dict[str, str]
    """Modules that ran their original forward because no recording fitted: how often, and what differed first."""
    captured: bool
    num_quantize_before: int
    """Casts of a forward pass before sharing."""
    num_quantize_after: int
    """Casts of a forward pass as it runs."""
    num_kept_casts: int
    """Casts of weights kept between uses, at this moment."""
    kept_bytes: int
    """What they take, scales included."""
    why_none_kept: str
    """Why no cast of a weight is kept; empty where casts are, or will be."""
    passes: list[str]

    def by_backend(self) -> dict[str, int]:
        """`backend/fidelity` -> number of GEMMs."""
        return dict(Counter(f"{row.backend}/{row.fidelity}" for row in self.gemms))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_text(self) -> str:
        called = [row for row in self.gemms if row.fidelity != _UNCALLED]
        running = sum(row.runs_as_policy_says for row in called)
        lines = [
            f"policy {self.policy} ({self.policy_hash[:12]}): {running} of {len(called)} named GEMMs run so; "
            f"{len(self.left_alone)} sites are not named and left alone",
            f"casts in a forward pass: {self.num_quantize_before} before sharing, {self.num_quantize_after} after",
        ]
        kept = f"{self.num_kept_casts} kept, {self.kept_bytes} bytes"
        lines.append(f"casts of weights: {f'none kept: {self.why_none_kept}' if self.why_none_kept else kept}")
        if not self.captured:
            lines.append(
                "no example inputs were given: only GEMM-bearing modules were captured, no products of activations"
            )
        widths = [max(len(str(getattr(row, column))) for row in self.gemms) if self.gemms else 0 for column in _COLUMNS]
        for row in self.gemms:
            cells = [str(getattr(row, column)).ljust(width) for column, width in zip(_COLUMNS, widths)]
            lines.append("  ".join(cells) + f"  {row.reason}")
        lines += [f"left alone: {name}" for name in self.left_alone]
        lines += [f"warning: {finding}" for finding in self.warnings]
        lines += [f"not reached: {path}: {reason}" for path, reason in self.unreached.items()]
        lines += [f"not recorded: {path or '(root)'}: {reason}" for path, reason in self.opaque.items()]
        lines += [f"never called: {name}: {_WHY_UNCALLED}" for name in self.uncalled]
        lines += [f"guard missed: {path or '(root)'}: {reason}" for path, reason in self.guard_misses.items()]
        if self.guard_misses:
            lines.append("guard missed: lpcompile.capture_more(model, ...) adds recordings for further kinds of call")
        lines += [f"pass {record}" for record in self.passes]
        return "\n".join(lines)

    def to_html(self, path: str | Path) -> Path:
        """Write the certificate as one self-contained page; returns its path."""
        columns = (*_COLUMNS, "reason", "rule")
        head = "".join(f"<th>{column}</th>" for column in columns)
        body = "".join(
            f'<tr class="{row.fidelity}">'
            + "".join(f"<td>{html.escape(str(getattr(row, c)))}</td>" for c in columns)
            + "</tr>"
            for row in self.gemms
        )
        notes = "".join(
            f"<li>{html.escape(line)}</li>" for line in self.to_text().splitlines() if ":" in line.split("  ")[0]
        )
        page = _PAGE.format(
            title=html.escape(f"{self.policy}: lowering certificate"), head=head, body=body, notes=notes
        )
        target = Path(path)
        target.write_text(page, encoding="utf-8")
        return target


def report(model: nn.Module) -> Report:
    """The lowering certificate of a compiled model (also through DDP or a DeepSpeed engine). Raises LpError if it was
    not compiled.
    """
    compiled = get_compiled(model)
    phase = compiled.phase
    misses = {
        path: f"{_counted(record.num_misses)} ran the original forward, first as {record.first_miss}"
        for path, module in model.named_modules()
        if isinstance(record := captured(module), CapturedForward) and record.num_misses
    }
    rows = [row for site in compiled.sites for row in _rows_of_site(compiled, site.name, site.op)]
    return Report(
        policy=phase.policy.name,
        policy_hash=compiled.policy.hash,
        gemms=rows,
        left_alone=[site.name for site in compiled.sites if phase.resolution.specs.get(site.name) is None],
        unmatched_rules=phase.resolution.unmatched,
        warnings=phase.program.findings,
        unreached={item.path: item.reason for item in compiled.unreached},
        opaque={path: str(reason) for path, reason in compiled.calls.opaque.items()},
        uncalled=[site.name for site in compiled.sites if site.name in compiled.uncalled],
        guard_misses=misses,
        captured=compiled.calls.num > 0,
        num_quantize_before=phase.num_quantize_before,
        num_quantize_after=num_op(phase.program, "lp.quantize"),
        num_kept_casts=compiled.state.constants.num_casts,
        kept_bytes=compiled.state.constants.num_bytes,
        why_none_kept=compiled.state.constants.why_none,
        passes=[
            f"{record.name}: {1e3 * record.seconds:.1f} ms, {record.nodes_before} -> {record.nodes_after} nodes"
            for record in phase.records
        ],
    )


def _counted(num_calls: int) -> str:
    return f"{num_calls} call" if num_calls == 1 else f"{num_calls} calls"


def _rows_of_site(compiled: Compiled, name: str, op: str) -> list[GemmRow]:
    phase = compiled.phase
    spec: LayerSpec | None = phase.program.specs.get(name)
    if spec is None:
        return []
    rows = []
    is_uncalled = name in compiled.uncalled
    for role in ROLES:
        gemm = spec.role(role)
        choice = phase.program.choices.get(name, {}).get(role)
        accumulate = gemm.accumulate + (f"/{gemm.chunk}" if gemm.chunk else "")
        how = (
            ("original", "refused", phase.program.refusals.get(name, ""))
            if choice is None
            else (choice.backend, choice.fidelity, choice.reason)
        )
        if is_uncalled and how[1] != "refused":
            how = "none", _UNCALLED, f"{_WHY_UNCALLED} ({how[0]} if it is)"
        rule = phase.resolution.rule_of.get(name, {}).get(role, "no rule: fp32")
        decided = phase.program.decisions.get(name, {}).get(role)
        rule += f"; {decided}" if decided else ""
        rows.append(GemmRow(name, op, role, str(gemm.lhs), str(gemm.rhs), accumulate, gemm.out, *how, rule))
    return rows


_UNCALLED = "not-called"
_WHY_UNCALLED = "not called by the recorded forward"

_COLUMNS = ("name", "role", "lhs", "rhs", "accumulate", "out", "backend", "fidelity")

_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px system-ui;margin:2em}}table{{border-collapse:collapse}}td,th{{padding:.2em .6em;border-bottom:1px
solid #ddd; text-align:left}}tr.refused{{background:#fdd}}tr.bounded{{background:#ffd}}</style>
<h1>{title}</h1><ul>{notes}</ul><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
"""
