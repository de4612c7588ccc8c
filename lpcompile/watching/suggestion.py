"""Suggestion: rules for the GEMMs that lose far more than the others, and the SQNR that they would have.

A GEMM loses too much if its SQNR is below LOW_DB, or more than GAP_DB below the median of its role (of ENOUGH_DB, where
the others have more). An operand that
makes it so gets the candidate of the fewest bits, not below those of what ran, under which the operand reaches what the
others of its role have; if none does, the one with the best SQNR. The other operand stays as it was. What a backend
would refuse is not suggested.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from lpcompile.policy.file import load_policy, shipped_policies
from lpcompile.policy.gemms import Accumulate, Bwd, Fwd, Grad
from lpcompile.policy.operands import Operand as PolicyOperand
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Match, Rule
from lpcompile.policy.yaml_text import dump
from lpcompile.watching.candidates import Candidate
from lpcompile.watching.results import Gemm, Results
from passes.place import place
from runtime.numerics.block_formats import get_block_format, is_block_format
from runtime.numerics.formats import get_format
from runtime.numerics.range_formats import get_range_format, is_range_format
from runtime.numerics.specs import FP32_SUMS, GemmSpec, LayerSpec, Role
from runtime.quantize.cast_error import decibels

LOW_DB, GAP_DB = 10.0, 6.0
ENOUGH_DB = 25.0
"""What an operand is to reach where the others of its role tell nothing better: 8-bit floats have about 25 to 31 dB."""


@dataclass(frozen=True)
class Mend:
    """One GEMM with other operands. `changes`: of each operand that changes its name, the candidate, and its SQNR."""

    gemm: Gemm
    changes: tuple[tuple[str, str, float], ...]
    spec: GemmSpec
    predicted_db: float


@dataclass(frozen=True)
class Suggestion:
    """What loses most first."""

    results: Results
    mends: tuple[Mend, ...]
    helpless: tuple[Gemm, ...]
    """What loses too much, and no format that was measured does better."""

    def to_yaml(self, extends: str | None = None) -> str:
        """A policy file; `extends` as Telemetry.suggest says."""
        policy = self.results.policy
        named = extends or _name_of(policy)
        steps = ", ".join(str(step.step) for step in self.results.steps[-8:])
        lines = [f"# Suggested by lpcompile's telemetry of {policy.name}: steps {steps}."]
        worse = "and no format that was measured does better"
        lines += [f"# {gemm.site} {gemm.role} has {_db(gemm.sqnr_db)}, {worse}." for gemm in self.helpless]
        if not (self.mends or self.helpless):
            lines.append("# No GEMM loses far more than the others: there is no rule to add.")
        if policy.schedule:
            lines.append("# Of a schedule the rules here are for the phases without a policy of their own.")
        head: dict[str, Any] = {"version": 1, "name": "suggested"}
        text = "\n".join(lines) + "\n" + dump(head | ({"extends": [named]} if named else {}))
        rest = {} if named else _without_head(policy)
        rules = [*(self._rule_text(site) for site in dict.fromkeys(mend.gemm.site for mend in self.mends))]
        rules += [dump({"rules": [rule.plain()]}).partition("\n")[2] for rule in policy.rules if not named]
        if rules:
            text += "rules:\n" + "".join(rules)
        return text + (dump(rest) if rest else "")

    def _rule_text(self, site: str) -> str:
        mends = [mend for mend in self.mends if mend.gemm.site == site]
        notes = "".join(f"# {describe(mend)}\n" for mend in mends)
        gemms = {mend.gemm.role: _section(mend.gemm.role, mend.spec) for mend in mends}
        rule = Rule(match=Match(name=(site,), op=(mends[0].gemm.described.op,)), **gemms)  # type: ignore[arg-type]
        return notes + dump({"rules": [rule.plain()]}).partition("\n")[2]


def describe(mend: Mend) -> str:
    """`h.1.mlp.c_fc fwd: x 0.3 dB as hfp8-143 (96% beyond ...), 31.5 dB as e4m3 tensor; the GEMM 0.3 dB -> 28.1 dB`"""
    parts = []
    for name, candidate, sqnr in mend.changes:
        operand = next(each for each in mend.gemm.operands if each.name == name)
        over, under = operand.error.share("overflow"), operand.error.share("underflow")
        why = f" ({over:.0%} beyond its largest value)" if over > 0.005 else ""
        why = why or (f" ({under:.0%} underflow)" if under > 0.005 else "")
        parts.append(f"{name} {_db(operand.sqnr_db)} as {operand.cast.split()[0]}{why}, {_db(sqnr)} as {candidate}")
    what = f"the GEMM {_db(mend.gemm.sqnr_db)} -> {_db(mend.predicted_db)}"
    return f"{mend.gemm.site} {mend.gemm.role}: {'; '.join(parts)}; {what}"


def suggest(results: Results, candidates: Sequence[Candidate]) -> Suggestion:
    """What loses too much, with what would mend it."""
    mends, helpless = [], []
    for gemm in results.ranking:
        peers = [other.sqnr_db for other in results.gemms if other.role == gemm.role and other is not gemm]
        usual = min(median([each for each in peers if each is not None] or [ENOUGH_DB]), ENOUGH_DB)
        assert gemm.sqnr_db is not None
        if gemm.sqnr_db >= LOW_DB and gemm.sqnr_db >= usual - GAP_DB:
            continue
        mend = _mend(gemm, usual, candidates)
        if mend is None:
            helpless.append(gemm)
        else:
            mends.append(mend)
    return Suggestion(results, tuple(mends), tuple(helpless))


def _mend(gemm: Gemm, usual: float, candidates: Sequence[Candidate]) -> Mend | None:
    """None where no candidate does better, or may run."""
    aim = max(usual, LOW_DB)
    spec, changes, noise = gemm.spec.role(gemm.role), [], 0.0
    for side, operand in zip(("lhs", "rhs"), gemm.operands):
        own = operand.error.noise
        assert own is not None
        found = None
        if decibels(own) < aim:
            found = _best(gemm, side, operand.name, spec, own, aim, candidates)
        if found is None:
            noise += own
            continue
        candidate, of_it = found
        spec = _with(gemm, side, spec, candidate)
        changes.append((operand.name, candidate.name, decibels(of_it)))
        noise += of_it
    return Mend(gemm, tuple(changes), spec, decibels(noise)) if changes else None


def _best(
    gemm: Gemm, side: str, name: str, spec: GemmSpec, own: float, aim: float, candidates: Sequence[Candidate]
) -> tuple[Candidate, float] | None:
    operand = next(each for each in gemm.operands if each.name == name)
    bits = _bits(operand.cast.split()[0])
    fits: list[tuple[Candidate, float]] = []
    for candidate in sorted(candidates, key=lambda each: each.bits):
        error = operand.candidates.get(candidate.name)
        if error is None or error.noise is None or error.noise >= own / 2 or candidate.bits < bits - 0.5:
            continue
        if _runs(gemm, _with(gemm, side, spec, candidate)):
            fits.append((candidate, error.noise))
    good = [each for each in fits if decibels(each[1]) >= aim]
    return good[0] if good else min(fits, key=lambda each: each[1], default=None)


def _with(gemm: Gemm, side: str, spec: GemmSpec, candidate: Candidate) -> GemmSpec:
    kind = _kind(gemm)
    cast = candidate.operand(kind, gemm.role, side)  # type: ignore[arg-type]
    mended = replace(spec, lhs=cast) if side == "lhs" else replace(spec, rhs=cast)
    return replace(mended, accumulator=FP32_SUMS) if mended.accumulator.is_integer else mended


def _runs(gemm: Gemm, spec: GemmSpec) -> bool:
    layer: LayerSpec = replace(gemm.spec, **{gemm.role: spec})  # type: ignore[arg-type]
    placed = place(_kind(gemm), gemm.described.op, layer, "cpu")
    return not isinstance(placed, str) and placed.choices[gemm.role].fidelity != "refused"


def _kind(gemm: Gemm) -> str:
    """For what is asked here a Conv1D of transformers is a linear layer: a policy says both alike."""
    op = gemm.described.op
    return op if op in ("linear", "matmul") else "conv"


def _bits(name: str) -> float:
    if is_block_format(name):
        return get_block_format(name).bits_per_value
    return float(get_range_format(name).bits if is_range_format(name) else get_format(name).bits)


def _section(role: Role, spec: GemmSpec) -> Fwd | Bwd | Grad:
    how = spec.accumulator
    keys = {key: getattr(how, key) for key in Accumulate.model_fields}
    said = {key: each for key, each in keys.items() if each != Accumulate.model_fields[key].default}
    given: dict[str, Any] = {"accumulate": Accumulate(**said), "out": spec.out}
    lhs, rhs = PolicyOperand.of(spec.lhs), PolicyOperand.of(spec.rhs)
    if role == "fwd":
        return Fwd(x=lhs, w=rhs, **given)
    return Bwd(dy=lhs, w=rhs, **given) if role == "bwd" else Grad(dy=lhs, x=rhs, **given)


def _name_of(policy: Policy) -> str | None:
    """Its shipped name, or the file it was read from."""
    if policy.name in shipped_policies() and load_policy(policy.name).hash == policy.hash:
        return policy.name
    for rule in policy.rules:
        path = Path(rule._origin.file) if rule._origin.file else None
        if path is not None and path.is_file() and load_policy(path).hash == policy.hash:
            return str(path)
    return None


def _without_head(policy: Policy) -> dict[str, Any]:
    """The sections of a policy, to be written out after its rules."""
    text = policy.model_copy(update={"rules": (), "extends": (), "source": ""}).to_yaml()
    values: dict[str, Any] = yaml.safe_load(text)
    return {key: value for key, value in values.items() if key not in ("version", "name")}


def _db(value: float | None) -> str:
    if value is None:
        return "no values"
    return "exact" if math.isinf(value) else f"{value:.1f} dB"
