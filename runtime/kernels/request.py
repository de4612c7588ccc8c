"""Requests: one GEMM to place, and what kernels ask of its numbers before they accept it."""

from dataclasses import dataclass

from runtime.numerics.accumulators import ACCUMULATORS
from runtime.numerics.block_formats import grid_format
from runtime.numerics.format_kinds import FloatFormat, Format, IntFormat
from runtime.numerics.free_axes import FREE_AXES, Side
from runtime.numerics.specs import SCALE_RULES, AccumulateSpec, GemmSpec, QuantSpec, Role

INT32 = AccumulateSpec("int32")
SCALE_IN_SUM = "a scale inside the sum is multiplied into the values"


@dataclass(frozen=True)
class GemmRequest:
    """One GEMM to place: the layer kind (of FREE_AXES), the role, the numbers and the device type."""

    kind: str
    role: Role
    spec: GemmSpec
    device: str = "cpu"

    @property
    def is_plain(self) -> bool:
        """Whether it is one product of two matrices: that of a linear layer."""
        return self.kind in ("linear", "linear_kn")

    @property
    def rows(self) -> tuple[Format, Format]:
        """The formats of the grid values that are multiplied."""
        return grid_format(self.spec.lhs.format), grid_format(self.spec.rhs.format)

    @property
    def operands(self) -> str:
        return f"{self.spec.lhs.format} x {self.spec.rhs.format}"

    def has_scale_in_sum(self, rules: tuple[str, ...] = SCALE_RULES) -> bool:
        """Whether a scale of one of these rules varies along the sum, and is then multiplied into its operand's
        values.
        """
        operands: tuple[tuple[Side, QuantSpec], ...] = (("lhs", self.spec.lhs), ("rhs", self.spec.rhs))
        for side, operand in operands:
            free = ("tensor", FREE_AXES[self.kind][self.role, side])
            if operand.scale is not None and operand.scale.granularity not in free and operand.scale.rule in rules:
                return True
        return False

    @property
    def leaves_grid(self) -> bool:
        """Whether an operand's values are rounded to fp32 once more, by a scale in the sum that is no power of two."""
        return self.has_scale_in_sum(("amax",))

    @property
    def is_int8(self) -> bool:
        """Whether int8 matrices are multiplied into int32 sums."""
        spec = self.spec
        return (
            spec.accumulator == INT32 and spec.lhs.format == spec.rhs.format == "int8" and not self.has_scale_in_sum()
        )

    @property
    def can_underflow(self) -> bool:
        """Whether a product of two operands can leave fp32's normal range, which the bf16 unit flushes to zero."""
        for operand, row in zip((self.spec.lhs, self.spec.rhs), self.rows):
            is_scaled = operand.scale is not None and operand.scale.rule == "pow2"
            if is_scaled or (isinstance(row, FloatFormat) and row.tiny < 2.0**-63):
                return True
        return False

    @property
    def has_exact_products(self) -> bool:
        """Whether fp32 has every product of two grid values: 24 significant bits, none below its subnormals."""
        lhs, rhs = self.rows
        return significant_bits(lhs) + significant_bits(rhs) <= 24 and quantum(lhs) * quantum(rhs) >= 2.0**-149

    @property
    def num_roundings(self) -> int:
        """Fp32 roundings on the way of a product into the result, beside the K - 1 of its sum: its own unless it is
        exact, and one for each scale that is multiplied in, before the sum or after it.
        """
        scaled = sum(operand.has_scale for operand in (self.spec.lhs, self.spec.rhs))
        return scaled + (not self.has_exact_products)

    @property
    def order_bound(self) -> str:
        """What sums in fp32, in an order of the library's own, may differ by, to first order (Jeannerod and Rump,
        "Improved error bounds for inner products in floating-point arithmetic", SIAM J. Matrix Anal. Appl., 2013).
        """
        num_units = {0: "(K-1)", 1: "K"}.get(self.num_roundings, f"(K+{self.num_roundings - 1})")
        small = "" if quantum(self.rows[0]) * quantum(self.rows[1]) >= 2.0**-149 else " + K 2^-150"
        return f"order of additions differs, |error| <= {num_units} 2^-24 sum|a b|{small}"

    @property
    def sum_text(self) -> str:
        """The accumulator, for a reason."""
        how = self.spec.accumulator
        chunk, words = f" in chunks of {how.chunk}" if how.chunk else "", str(how).split(" ")[1:]
        return how.format + chunk + (f" ({' '.join(words)})" if words else "")

    @property
    def sum_rule(self) -> str:
        """How the accumulator adds, for a reason."""
        how = self.spec.accumulator
        if how.model == "aligned":
            named = "".join(f", as {row.name}" for row in ACCUMULATORS.values() if row.text == str(how))
            at_once = f"adds {how.chunk} products and the sum at once, {how.align_bits} fraction bits of the largest"
            return f"{at_once}, and cuts to {how.format}{named}"
        return f"rounds to {self.sum_text} after every {'chunk' if how.model == 'per_chunk' else 'add'}"

    @property
    def why_not_aligned(self) -> str:
        """Why an aligned sum, which takes values as their formats have them, cannot be made here; "" if it can."""
        if self.spec.accumulator.model != "aligned" or not self.has_scale_in_sum():
            return ""
        return "a scale inside the sum takes values off their formats, and an aligned sum is of values of formats"


def significant_bits(row: Format) -> int:
    """Of the largest value, so that all others have no more; 24 for a table."""
    if isinstance(row, IntFormat):
        return int(max(row.max, -row.min)).bit_length()
    return row.mantissa + 1 if isinstance(row, FloatFormat) else 24


def quantum(row: Format) -> float:
    """Of what every value is a multiple; 1 for a table, whose values are taken for full fp32 ones."""
    return row.quantum if isinstance(row, FloatFormat) else 1.0
