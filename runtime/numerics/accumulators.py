"""Accumulators by name: how the matrix units of GPUs add, a row each, as the text of an AccumulateSpec.

    hopper-fp8   ->   1-8-13/32 toward_zero aligned

reference_aligned.py says what such a sum is. A row is what one instruction computes, called again and again with its
result as the running sum; software that adds partial sums outside of the unit computes something else.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.numerics.block_formats import grid_format
from runtime.numerics.format_kinds import FloatFormat

if TYPE_CHECKING:
    from runtime.numerics.specs import GemmSpec

MAX_BITS = 11
"""Significant bits of an operand of an aligned sum, those of fp16."""


@dataclass(frozen=True)
class AccumulatorRow:
    """One accumulator of one kind of hardware."""

    name: str
    """How policies write it."""
    text: str
    """What it means."""
    source: str
    """Where the numbers come from."""


_MMA_SIM = "MMA-Sim, arXiv 2511.10909 and github.com/microsoft/MMA-Sim: models that agree bit for bit with the GPUs"

ACCUMULATORS = {
    row.name: row
    for row in (
        AccumulatorRow("hopper-fp8", "1-8-13/32 toward_zero aligned", f"{_MMA_SIM}; wgmma of 8 bits"),
        AccumulatorRow("hopper-bf16", "fp32/16 toward_zero aligned[25]", f"{_MMA_SIM}; wgmma of 16 bits"),
        AccumulatorRow("blackwell-fp8", "fp32/32 toward_zero aligned[25]", f"{_MMA_SIM}; tcgen05.mma of 8 bits"),
        AccumulatorRow("ada-fp8", "1-8-13/16 toward_zero aligned", f"{_MMA_SIM}; mma of 8 bits, K 32 in two halves"),
        AccumulatorRow(
            "ampere-bf16", "fp32/8 toward_zero aligned[24]", f"{_MMA_SIM}; mma of 16 bits, K 16 in two halves"
        ),
    )
}


def declines_aligned(spec: "GemmSpec") -> str | None:
    """Why an aligned sum of these operands is not defined; None if it is."""
    for operand in (spec.lhs, spec.rhs):
        row = grid_format(operand.format)
        if operand.is_block or not isinstance(row, FloatFormat) or row.mantissa >= MAX_BITS:
            what = f"scalar float operands of at most {MAX_BITS} significant bits"
            return f"aligned sums, `{spec.accumulator}`, are of {what}, not of {operand.format}"
    return None
