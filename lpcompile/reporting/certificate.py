"""The lowering certificate: for every GEMM and role what it runs as, how exactly, or why not; as values, text, JSON
and HTML.
"""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lpcompile.compiled import COMPILED, Compiled, get_root
from lpcompile.frontends.install import installed
from lpcompile.plan import PhaseCode
from lpcompile.policy.rules import Site
from lpcompile.reporting.changes import AGAIN, added_sites, added_writers, lost_leaves, uncalled_leaves
from lpcompile.reporting.page import make_page
from lpcompile.reporting.rows import REFUSED, UNCALLED, GemmRow
from lpcompile.reporting.text import print_report
from lpcompile.reporting.unseen import unseen_products
from passes.finding import Finding
from runtime.numerics.specs import ROLES, LayerSpec, Role
from runtime.ops.kept import kept_nbytes
from runtime.ops.product import Product
from runtime.quantize.observed.end_step import observed_in


@dataclass(frozen=True)
class Report:
    """What lpcompile did to a model under the phase of the schedule in force, or of evaluation in that mode."""

    policy: str
    policy_hash: str
    gemms: list[GemmRow]
    left_alone: list[str]
    """GEMM sites that no rule names: they run as the uncompiled model does."""
    unmatched_rules: list[str]
    """Of every phase of the schedule; also of a shipped policy none of whose rules matches anything."""
    warnings: list[Finding]
    """What the checks of the policy against the model found, in any phase of the schedule: rules that match or decide
    nothing among it.
    """
    unreached: dict[str, str]
    """Modules whose GEMMs no graph shows, with the reason."""
    uncalled: dict[str, str]
    """Sites of leaves that the example forward, or the model so far, never called, and which: other operations may use
    their weights.
    """
    unseen: dict[str, str]
    """Modules that may multiply by a matrix of their own, as routers do, which no call has shown yet: what becomes of
    it. None once example inputs were given.
    """
    unserved: str
    """mode="infer": calls that ran module by module, since the exported graph fits no such call: how many, and why the
    first; empty if none did."""
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
    joint: str = ""
    """What the joint front end captured so far, as a sentence; empty without one."""
    num_graphs: int = 0
    """Joint graphs captured so far."""
    num_rewritten: int = 0
    """Products, FWD, BWD and GRAD each one, that were rewritten in them."""
    observed: str = ""
    """Of scales that follow from earlier steps: how many there are, and which have seen no step; empty without any."""

    @property
    def called(self) -> list[GemmRow]:
        """The rows but those of leaves that were never called."""
        return [row for row in self.gemms if row.fidelity != UNCALLED]

    def by_backend(self) -> dict[str, int]:
        """`backend/fidelity` -> number of GEMMs."""
        return dict(Counter(f"{row.backend}/{row.fidelity}" for row in self.gemms))

    def share_of_flops(self, fidelity: str) -> float | None:
        """Of the FLOPs that one row of input costs in the layers with weights, the share of this fidelity; None where
        no layer has a weight.
        """
        total = sum(row.flops for row in self.called)
        return sum(row.flops for row in self.called if row.fidelity == fidelity) / total if total else None

    @property
    def kept_per_row(self) -> float:
        """Bytes that forward keeps for backward by a row of input of the linear layers, where none share their x."""
        return sum(row.kept_per_row for row in self.called)

    @property
    def kept(self) -> int | None:
        """Bytes that the last calls in eager code kept for BWD and GRAD; None before one."""
        kept = [row.kept for row in self.called if row.kept is not None]
        return sum(kept) if kept else None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_text(self, full: bool = False) -> str:
        """The certificate to read: what does not run first, then a line per group of layers that run alike; with
        `full` a line per GEMM.
        """
        return print_report(self, full)

    def to_html(self, path: str | Path) -> Path:
        """Write the certificate as one self-contained page, to sort, filter and fold; returns its path."""
        target = Path(path)
        target.write_text(make_page(self), encoding="utf-8")
        return target


def report(model: nn.Module) -> Report:
    """The lowering certificate of a compiled model, also of one under DDP, a DeepSpeed engine, PEFT or another wrapper.
    Raises LpError if there is none, or several.
    """
    root = get_root(model)
    compiled: Compiled = vars(root)[COMPILED]
    phase = compiled.phase_of(root)
    exported, unserved = installed(root), ""
    if num_unserved := getattr(exported, "num_unserved", 0):
        unserved = f"{_counted(num_unserved)} ran module by module, first as {exported.first_unserved}"
    lost = lost_leaves(root, compiled)
    uncalled = uncalled_leaves(root, compiled)
    rows = [
        row
        for site in compiled.sites
        for row in _rows_of_site(compiled, phase, site, lost.get(site.name, ""), uncalled.get(site.name, ""))
    ]
    rows += [row for site in added_sites(root, compiled) for row in _rows_of_added(phase, site)]
    findings = [*dict.fromkeys(each for phase in compiled.phases for each in phase.program.findings)]
    return Report(
        policy=phase.policy.name,
        policy_hash=compiled.policy.hash,
        gemms=rows,
        left_alone=[site.name for site in compiled.sites if phase.resolution.specs.get(site.name) is None],
        unmatched_rules=[f"{each.where} {each.what}" for each in findings if each.code in _IDLE],
        warnings=findings,
        unreached={**compiled.unreached, **added_writers(root, compiled)},
        uncalled=uncalled,
        unseen=unseen_products(root, compiled),
        unserved=unserved,
        captured=compiled.called is not None,
        num_quantize_before=phase.num_quantize_before,
        num_quantize_after=phase.num_quantize_after,
        num_kept_casts=compiled.state.constants.num_casts,
        kept_bytes=compiled.state.constants.num_bytes,
        why_none_kept=compiled.state.constants.why_none,
        passes=[
            f"{record.name}: {1e3 * record.seconds:.1f} ms, {record.nodes_before} -> {record.nodes_after} nodes"
            for record in phase.records
        ],
        joint=str(compiled.joint or ""),
        num_graphs=compiled.joint.num_graphs if compiled.joint else 0,
        num_rewritten=compiled.joint.num_products if compiled.joint else 0,
        observed=_observed(compiled),
    )


def _observed(compiled: Compiled) -> str:
    scales = observed_in(compiled.state.quantizers)
    waiting = [each.owner for each in scales if each.is_waiting]
    if not scales:
        return ""
    told = f"scales that follow from earlier steps: {len(scales)}"
    if waiting:
        told += f", of which {len(waiting)} have seen none and are those of the present tensor, first {waiting[0]}"
    return told


def _counted(num_calls: int) -> str:
    return f"{num_calls} call" if num_calls == 1 else f"{num_calls} calls"


def _rows_of_site(compiled: Compiled, phase: PhaseCode, site: Site, lost: str, uncalled: str) -> list[GemmRow]:
    """`lost`: why the site no longer runs as it was compiled; `uncalled`: why it does not run at all."""
    name, counts = site.name, compiled.state.calls
    spec: LayerSpec | None = phase.program.specs.get(name)
    if spec is None:
        return []
    rows = []
    for role in ROLES:
        choice = phase.program.choices.get(name, {}).get(role)
        fallen = counts.sites[name].reason if name in counts.sites else ""
        calls = (counts.seen(name, role), counts.as_said(name, role), *counts.since_told(name, role))
        if choice is None or lost:
            how = "original", REFUSED, lost or phase.program.refusals.get(name, "")
        elif uncalled:
            how = "none", UNCALLED, f"{uncalled} ({choice.backend} if it is)"
        elif choice.fidelity == REFUSED:
            how, calls = ("original", REFUSED, choice.reason), (calls[0], 0, calls[2], 0)
        elif calls[1] < calls[0]:
            how = choice.backend, choice.fidelity, f"{calls[0] - calls[1]} of {calls[0]} calls ran otherwise: {fallen}"
        else:
            how = choice.backend, choice.fidelity, choice.reason
        rule = phase.resolution.rule_of.get(name, {}).get(role, "no rule: fp32")
        decided = phase.program.decisions.get(name, {}).get(role)
        rule += f"; {decided}" if decided else ""
        row = _row(site, role, spec, how, rule, calls)
        product = phase.products.get(name)
        if product is not None and how[1] not in (REFUSED, UNCALLED):
            kept = counts.sites[name].kept.get(role) if name in counts.sites else None
            row = replace(row, kept_per_row=_kept_per_row(product, site, role), kept=kept)
        rows.append(row)
    return rows


def _kept_per_row(product: Product, site: Site, role: Role) -> float:
    """Of a linear layer, whose GRAD reads x; BWD reads the weight, which is kept anyway."""
    if role != "grad" or site.op != "linear" or not site.k or product.is_identity:
        return 0.0
    return kept_nbytes(product.spec.grad.rhs, product.spec.keep, (_ROWS, site.k)) / _ROWS


_ROWS = 4096


def _rows_of_added(phase: PhaseCode, site: Site) -> list[GemmRow]:
    """Of a leaf that was not there when the model was compiled."""
    found = phase.policy.resolve([site])
    spec, rules = found.specs[site.name], found.rule_of.get(site.name, {})
    assert spec is not None
    how = "original", REFUSED, f"the module came after compiling. Try {AGAIN}"
    return [_row(site, role, spec, how, rules.get(role, "no rule: fp32"), (0, 0, 0, 0)) for role in ROLES]


def _row(
    site: Site, role: Role, spec: LayerSpec, how: tuple[str, str, str], rule: str, calls: tuple[int, int, int, int]
) -> GemmRow:
    gemm = spec.role(role)
    accumulate = gemm.accumulate + (f"/{gemm.chunk}" if gemm.chunk else "")
    numbers = str(gemm.lhs), str(gemm.rhs), accumulate, gemm.out
    return GemmRow(site.name, site.op, role, *numbers, *how, rule, 2 * (site.n or 0) * (site.k or 0), *calls)


_IDLE = ("rule-matches-nothing", "policy-names-nothing")
