"""Results: what was measured, by GEMM: over all steps that were looked at, and step by step.

    noise of a GEMM = noise of its left operand + that of its right one          SQNR = -10 log10 noise

Errors of two operands are taken for independent, so their noise adds up relative to the product of their signals.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from lpcompile.watching.watcher import Key, StepRecord
from runtime.numerics.specs import LayerSpec, Role
from runtime.quantize.cast_error import CastError, decibels


@dataclass(frozen=True)
class Operand:
    """One operand of a GEMM."""

    name: str
    """As a policy calls it: x, w, dy; a, b."""
    cast: str
    """What ran, as `FORMAT ROUNDING [SCALE]`."""
    largest: float
    error: CastError
    candidates: dict[str, CastError]

    @property
    def sqnr_db(self) -> float | None:
        return self.error.sqnr_db


@dataclass(frozen=True)
class Gemm:
    """One GEMM of one site."""

    site: str
    role: Role
    operands: tuple[Operand, Operand]
    refused: dict[str, str]
    """Candidates that could not run here, and why."""
    spec: LayerSpec
    """Of the site, as the policy says it."""
    described: Site

    @property
    def noise(self) -> float | None:
        return _sum(each.error.noise for each in self.operands)

    @property
    def sqnr_db(self) -> float | None:
        """None of operands that hold nothing but zeros."""
        return None if self.noise is None else decibels(self.noise)

    def noise_under(self, candidate: str) -> float | None:
        """With both operands in this format; None where it was not measured."""
        errors = [each.candidates.get(candidate) for each in self.operands]
        return _sum(None if error is None else error.noise for error in errors)

    def sqnr_under(self, candidate: str) -> float | None:
        noise = self.noise_under(candidate)
        return None if noise is None else decibels(noise)


@dataclass(frozen=True)
class StepResult:
    """One step: SQNR and largest magnitude by site, role and operand."""

    step: int
    sqnr_db: dict[tuple[str, Role, str], float | None]
    largest: dict[tuple[str, Role, str], float]
    underflow: dict[tuple[str, Role, str], float]
    overflow: dict[tuple[str, Role, str], float]
    exponents: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """Elements of the sample by exponent, by site and tensor."""


@dataclass(frozen=True)
class Results:
    """All of it. `gemms` in the order of the sites."""

    policy: Policy
    every: int
    sample: int
    candidates: tuple[str, ...]
    gemms: tuple[Gemm, ...]
    steps: tuple[StepResult, ...]

    @property
    def ranking(self) -> list[Gemm]:
        """What loses most first; what loses nothing, or holds nothing, is left out."""
        losing = [gemm for gemm in self.gemms if gemm.noise]
        return sorted(losing, key=lambda gemm: -(gemm.noise or 0.0))

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "policy": self.policy.name,
            "policy_hash": self.policy.hash,
            "every": self.every,
            "sample": self.sample,
            "steps": [step.step for step in self.steps],
            "counterfactuals": list(self.candidates),
            "gemms": [_plain_gemm(gemm, self.candidates) for gemm in self.gemms],
            "ranking": [[gemm.site, gemm.role, finite(gemm.sqnr_db)] for gemm in self.ranking],
            "history": [
                {
                    "step": step.step, "gemm": list(at), "sqnr_db": finite(sqnr), "amax": finite(step.largest[at]),
                    "underflow": step.underflow[at], "overflow": step.overflow[at],
                }
                for step in self.steps
                for at, sqnr in step.sqnr_db.items()
            ],
        }  # fmt: skip


def gather(
    records: Sequence[StepRecord], policy: Policy, specs: Mapping[str, LayerSpec], sites: Mapping[str, Site],
    candidates: Sequence[str], every: int, sample: int, refused: Mapping[str, Mapping[str, str]],
) -> Results:  # fmt: skip
    """Sums over steps, of the casts that ran last where a schedule changed them."""
    by_step = [(record, record.errors()) for record in records]
    by_step = [(record, errors) for record, errors in by_step if errors]
    ran = {at: cast for record, _ in by_step for at, cast in record.ran.items()}
    sums: dict[Key, CastError] = {}
    largest: dict[tuple[str, str], float] = {}
    names: dict[tuple[str, Role], tuple[str, str]] = {}
    for record, errors in by_step:
        for key, error in errors.items():
            at = key.site, key.role, key.operand
            if key.label or record.ran.get(at) == ran[at]:
                sums[key] = sums[key] + error if key in sums else error
        for tensor, value in record.largest.items():
            largest[tensor] = _larger(largest.get(tensor, 0.0), value)
        names |= {at: each for at, each in record.operands.items() if at in record.came}

    def operand(site: str, role: Role, name: str) -> Operand:
        errors = {each: sums[key] for each in candidates if (key := Key(site, role, name, each)) in sums}
        error = sums.get(Key(site, role, name, ""), CastError())
        return Operand(name, ran[site, role, name], largest.get((site, name), 0.0), error, errors)

    order = {name: number for number, name in enumerate(sites)}
    found = sorted(names, key=lambda at: (order.get(at[0], len(order)), _ROLES.index(at[1])))
    gemms = [
        Gemm(site, role, (operand(site, role, names[site, role][0]), operand(site, role, names[site, role][1])),
             dict(refused.get(site, {})), specs[site], sites[site])
        for site, role in found
        if site in specs and site in sites
    ]  # fmt: skip
    steps = [_step(record, errors) for record, errors in by_step]
    return Results(policy, every, sample, tuple(candidates), tuple(gemms), tuple(steps))


def step_result(record: StepRecord) -> StepResult:
    """Of one step that is over."""
    return _step(record, record.errors())


def _step(record: StepRecord, errors: Mapping[Key, CastError]) -> StepResult:
    ran = {(key.site, key.role, key.operand): error for key, error in errors.items() if not key.label}
    return StepResult(
        record.step,
        {at: error.sqnr_db for at, error in ran.items()},
        {at: record.largest.get((at[0], at[2]), 0.0) for at in ran},
        {at: error.share("underflow") for at, error in ran.items()},
        {at: error.share("overflow") for at, error in ran.items()},
        {at: counts.tolist() for at, counts in record.exponents.items()},
    )


def finite(value: float | None) -> float | None:
    """None in the place of what JSON does not have."""
    return None if value is None or not math.isfinite(value) else value


def numbers(error: CastError) -> dict[str, float | None]:
    """What is told of a cast."""
    return {
        "sqnr_db": finite(error.sqnr_db),
        "underflow": error.share("underflow"),
        "overflow": error.share("overflow"),
        "saturated": error.share("saturated"),
        "mean_relative_error": error.mean_relative,
    }


def count_formats(gemms: Sequence[Gemm]) -> list[tuple[str, int]]:
    """Formats that ran, with the number of operands, most frequent first."""
    return Counter(operand.cast.split()[0] for gemm in gemms for operand in gemm.operands).most_common()


def _plain_gemm(gemm: Gemm, candidates: Sequence[str]) -> dict[str, Any]:
    return {
        "site": gemm.site,
        "role": gemm.role,
        "sqnr_db": finite(gemm.sqnr_db),
        "counterfactual_sqnr_db": {
            each: finite(gemm.sqnr_under(each)) for each in candidates if gemm.noise_under(each) is not None
        },
        "not_here": gemm.refused,
        "operands": [
            {
                "operand": each.name, "cast": each.cast, "amax": finite(each.largest), "elements": each.error.count,
                **numbers(each.error),
                "counterfactuals": {name: numbers(error) for name, error in each.candidates.items()},
            }
            for each in gemm.operands
        ],
    }  # fmt: skip


def _sum(values: Iterator[float | None]) -> float | None:
    known = list(values)
    return None if any(each is None for each in known) else sum(each for each in known if each is not None)


def _larger(a: float, b: float) -> float:
    """NaN if one is."""
    return b if math.isnan(b) or b > a else a


_ROLES: tuple[Role, ...] = ("fwd", "bwd", "grad")
