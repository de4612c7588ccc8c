"""choose-accumulator: `accumulate: auto` becomes the narrowest accumulator under which no sum swamps and none costs
more than the casts of its operands, and an accumulator that the policy states and that would swamp is told.

By the variance retention ratio (passes/analysis/vrr.py), from the length of each sum (passes/analysis/lengths.py) and
the mantissa bits of a product of its operands: v < 50. The theorem speaks of mantissas, of nearest rounding and of
swamping alone, so

    the format chosen is 1-E-M with E bits of exponent, 8 by default: the range of fp32
    M is at least what makes the roundings cost no more than the casts (passes/analysis/sum_error.py)
    sums rounded toward zero, of which the theorem knows nothing, are chosen and judged by that alone, and so are
    aligned sums, which lose what is small beside the largest term of a chunk
    sums rounded stochastically keep their mean and are not judged, nor are sums of integers, which add exactly
    a sum of unknown length (no example inputs) is left in fp32, which is told

It reads and writes `program.specs`, so it runs before annotate, and before an attention is taken apart, whose operands
have their shapes.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

from passes.analysis.lengths import Lengths, sum_lengths
from passes.analysis.room import why_it_may_saturate
from passes.analysis.sum_error import aligned_bits_for_casts, bits_for_casts, kept_toward_zero
from passes.analysis.vrr import MAX_LOG_LOSS, log_loss, min_accumulator, vrr
from passes.finding import Finding, names_of
from passes.ir.program import Program
from passes.manager import Pass
from runtime.errors import PassError
from runtime.numerics.block_formats import grid_format
from runtime.numerics.format_kinds import FloatFormat, IntFormat, LookupFormat
from runtime.numerics.formats import get_format
from runtime.numerics.specs import ROLES, AccumulateSpec, GemmSpec

_FP32_BITS = 23


@dataclass(frozen=True)
class ChooseAccumulator(Pass):
    """`exponent`: bits of exponent of a chosen format. `nonzero`: share of the products that are not 0, which shortens
    every sum, as the paper measures it; 1 is safe.
    """

    name: ClassVar[str] = "choose-accumulator"
    requires: ClassVar[tuple[str, ...]] = ("unannotated",)
    exponent: int = 8
    nonzero: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.nonzero <= 1:
            where, expected = "choose-accumulator{nonzero}", "0 < nonzero <= 1"
            raise PassError("no share of the products", where=where, expected=expected, got=str(self.nonzero))
        if not 2 <= self.exponent <= 8:
            where, expected = "choose-accumulator{exponent}", "2 to 8 bits"
            raise PassError("no exponent of a sum", where=where, expected=expected, got=str(self.exponent))

    def run(self, program: Program) -> bool:
        return self.choose(program, sum_lengths(program))

    def choose(self, program: Program, lengths: dict[str, Lengths]) -> bool:
        """As `run`, where the lengths of the sums are known already."""
        told: dict[Finding, list[str]] = defaultdict(list)
        changed = False
        for site, layer in program.specs.items():
            chosen = {role: layer.role(role) for role in ROLES}
            for role, gemm in chosen.items():
                n = lengths.get(site, Lengths()).get(role) or None  # an empty sum says nothing of others
                if gemm.accumulator.is_open:
                    chosen[role], why = self._close(gemm, n)
                    program.decisions.setdefault(site, {})[role] = why
                    if n is None:
                        told[_OPEN].append(f"{site} {role}")
                elif n is not None and (finding := self._judge(gemm, n)):
                    told[finding].append(f"{site} {role}")
            program.specs[site] = layer.having(chosen)
            changed |= program.specs[site] != layer
        program.findings += [replace(finding, where=names_of(sites)) for finding, sites in told.items()]
        return changed

    def _close(self, gemm: GemmSpec, n: int | None) -> tuple[GemmSpec, str]:
        """The GEMM with an accumulator, and why this one."""
        if n is None:
            return replace(gemm, accumulator=AccumulateSpec()), "auto: fp32, as the length of the sum is not known"
        m_p, terms, chunk = _sum_of(gemm, n)
        by_casts = bits_for_casts(gemm, n, self.nonzero)
        is_cut = gemm.accumulator.rounding == "toward_zero"
        by_swamping = 0 if is_cut else min_accumulator(m_p, terms, chunk, self.nonzero)
        bits, why = (by_casts, "the error of the casts") if by_casts > by_swamping else (by_swamping, "VRR")
        format = f"1-{self.exponent}-{bits}" if bits < _FP32_BITS else "fp32"
        accumulator = replace(gemm.accumulator, format=format)
        return replace(gemm, accumulator=accumulator), f"auto: {accumulator} for {n} products of {m_p} bits, by {why}"

    def _judge(self, gemm: GemmSpec, n: int) -> Finding | None:
        how, row = gemm.accumulator, get_format(gemm.accumulate)
        if reason := why_it_may_saturate(gemm, n):
            return Finding("accumulator-saturates", "", reason, "a wider accumulator")
        if not isinstance(row, FloatFormat) or how.mode == "stochastic":
            return None
        if how.model == "aligned":
            return self._judge_aligned(gemm, row, n)
        if how.mode == "toward_zero":
            return self._judge_cut(gemm, row, n)
        m_p, terms, chunk = _sum_of(gemm, n)
        loss = log_loss(row.mantissa, m_p, terms, chunk, self.nonzero)
        if loss < MAX_LOG_LOSS:
            return self._judge_ties(gemm, row, n) if how.mode == "nearest_away" else None
        kept = vrr(row.mantissa, m_p, terms, chunk, self.nonzero)
        whole, chunked = (min_accumulator(m_p, n, each, self.nonzero) for each in (None, 64))
        return Finding(
            "accumulator-swamps",
            "",
            f"sums of {n} products of {m_p} mantissa bits keep {kept:.2f} of their variance in {how}, by VRR; ln v = "
            f"{loss:.1f} is not below ln 50 = {MAX_LOG_LOSS:.1f}",
            f"an accumulator of {whole} mantissa bits, one of {chunked} in chunks of 64, or accumulate: auto",
        )

    def _judge_ties(self, gemm: GemmSpec, row: FloatFormat, n: int) -> Finding | None:
        """Of a sum whose ties all go away from zero."""
        bits = bits_for_casts(gemm, n, self.nonzero)
        if row.mantissa >= bits:
            return None
        return Finding(
            "accumulator-drifts",
            "",
            f"sums of {n} products grow in {gemm.accumulator}: many of their roundings are ties, which all go away "
            "from zero and cost more than the casts of the operands do",
            f"an accumulator of {bits} mantissa bits, chunks of 64, rounding: nearest_even, or accumulate: auto",
        )

    def _judge_aligned(self, gemm: GemmSpec, row: FloatFormat, n: int) -> Finding | None:
        """Of a sum in fixed point: by the bits of its terms, and of the accumulator if it has fewer."""
        align, fewer = aligned_bits_for_casts(gemm, n)
        how = gemm.accumulator
        if how.align_bits >= align and row.mantissa >= min(fewer, how.align_bits):
            return None
        return Finding(
            "accumulator-swamps",
            "",
            f"sums of {n} products in {how} are cut to {how.align_bits} fraction bits of the largest term, and then to "
            f"{row.mantissa}, which costs more than the casts of the operands do",
            f"{align} fraction bits of terms and accumulator, or accumulate: fp32",
        )

    def _judge_cut(self, gemm: GemmSpec, row: FloatFormat, n: int) -> Finding | None:
        """Of a sum that is rounded toward zero."""
        bits = bits_for_casts(gemm, n, self.nonzero)
        if row.mantissa >= bits:
            return None
        kept = kept_toward_zero(row.mantissa, gemm.accumulator, n, self.nonzero)
        return Finding(
            "accumulator-swamps",
            "",
            f"sums of {n} products keep {kept:.2f} of their variance in {gemm.accumulator}, whose roundings all go "
            "toward zero and cost more than the casts of the operands do",
            f"an accumulator of {bits} mantissa bits, nearest rounding, or accumulate: auto",
        )


def _sum_of(gemm: GemmSpec, n: int) -> tuple[int, int, int | None]:
    """(mantissa bits of a term, terms, chunk) of the sum that is rounded after every add.

    Under per_chunk, whose chunks are summed in fp32, the terms are the chunks, which have grown by log2 of their size.
    """
    m_p, how = product_bits(gemm.lhs.format, gemm.rhs.format), gemm.accumulator
    if how.model == "per_mac":
        return m_p, n, how.chunk
    size = min(how.chunk or n, n)
    return m_p + round(math.log2(size)), math.ceil(n / size), None


def product_bits(lhs: str, rhs: str) -> int:
    """Mantissa bits of an exact product of two values, the leading one not counted: e5m2 times e5m2 has 5."""
    return (_largest_significand(lhs) * _largest_significand(rhs)).bit_length() - 1


def _largest_significand(name: str) -> int:
    """The significand of most bits as an integer, all ones; of a block format, that of its grid values."""
    row = grid_format(name)
    if isinstance(row, FloatFormat):
        return int(2 ** (row.mantissa + 1)) - 1
    if isinstance(row, IntFormat):
        return int(2 ** int(max(row.max, -row.min)).bit_length()) - 1
    assert isinstance(row, LookupFormat)
    return int(max(_odd_part(abs(value)) for value in row.grid if value))


def _odd_part(value: float) -> int:
    """The integer without factor 2 that value is a power of two of."""
    numerator, _ = value.as_integer_ratio()
    return numerator // (numerator & -numerator)


_OPEN = Finding(
    "accumulator-open",
    "",
    "accumulate: auto needs the length of the sum, which no shape says; fp32 is used",
    "example_inputs, or a stated accumulator",
)
