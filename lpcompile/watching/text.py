"""Text: the table of what loses most, with what the other formats would do there."""

import math

from lpcompile.watching.results import Gemm, Operand, Results, count_formats


def print_results(results: Results, rows: int | None) -> str:
    """A line a GEMM, worst first; below it nothing but what its columns mean."""
    ranking = results.ranking
    shown = ranking if rows is None else ranking[:rows]
    lines = [headline(results), "", *table(results, shown)]
    if len(shown) < len(ranking):
        lines.append(f"... and {len(ranking) - len(shown)} GEMMs that lose less")
    if quiet := len(results.gemms) - len(ranking):
        lines.append(f"{quiet} GEMMs lose nothing, or hold nothing but zeros")
    refused = {(name, reason) for gemm in results.gemms for name, reason in gemm.refused.items()}
    lines += [f"not measured where it could not run: {name}: {reason}" for name, reason in sorted(refused)]
    return "\n".join(lines) + "\n"


def headline(results: Results) -> str:
    steps = [step.step for step in results.steps]
    formats = ", ".join(f"{name} ({count} operands)" for name, count in count_formats(results.gemms)[:6])
    looked = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
    return (
        f"{results.policy.name}: {len(results.gemms)} GEMMs, {looked}, about {results.sample} elements of each tensor; "
        f"{formats}. SQNR in dB, of a GEMM both operands together"
    )


def table(results: Results, gemms: list[Gemm]) -> list[str]:
    """Aligned columns, the head first."""
    head = ["GEMM", "", "SQNR", "loses by", "amax", "under", "over", "at max", "rel.err", *results.candidates]
    body = [_cells(results, gemm) for gemm in gemms]
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    left = (0, 1, 3)
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [head, *body]
    ]


def loser(gemm: Gemm) -> Operand:
    """The operand that makes most of the noise."""
    return max(gemm.operands, key=lambda each: each.error.noise or 0.0)


def decibel(value: float | None) -> str:
    if value is None:
        return "-"
    return "exact" if math.isinf(value) else f"{value:.1f}"


def percent(share: float) -> str:
    """Empty of none, and never 0% of some."""
    if not share:
        return ""
    return f"{share:.1%}" if share >= 0.0005 else "<0.1%"


def _cells(results: Results, gemm: Gemm) -> list[str]:
    worst = loser(gemm)
    error = worst.error
    relative = "" if error.mean_relative is None else f"{error.mean_relative:.3f}"
    shares = [percent(error.share(name)) for name in ("underflow", "overflow", "saturated")]
    others = [decibel(gemm.sqnr_under(name)) for name in results.candidates]
    cast = worst.cast.replace(" nearest_even", "")
    what = [gemm.site or "(root)", gemm.role, decibel(gemm.sqnr_db), f"{worst.name} {cast}", f"{worst.largest:.3g}"]
    return [*what, *shares, relative, *others]
