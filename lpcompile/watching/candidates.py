"""Candidates: formats that do not run and are measured all the same, as their user names them.

    bf16 | e4m3 tensor | int8 row | e4m3 block[1,128] | mxfp8:scale=rceil | nvfp4

A bare name is that format with scale 1, or a format that makes its own scales; `tensor` one scale from the largest
magnitude; `row` one per line that leaves the sum of each GEMM: rows of x and w in FWD, columns of dy and x in GRAD.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from lpcompile.errors import FormatError, LpError, did_you_mean, nearest_names
from runtime.numerics.block_formats import BLOCK_FORMATS, default_rounding, get_block_format, is_block_format
from runtime.numerics.formats import FORMATS, get_format
from runtime.numerics.free_axes import FREE_AXES, Side
from runtime.numerics.range_formats import get_range_format, is_range_format
from runtime.numerics.specs import IDENTITY, ROLES, GemmSpec, LayerSpec, QuantSpec, Role, ScaleSpec

COUNTERFACTUALS = (
    "bf16", "e4m3 tensor", "e5m2 tensor", "int8 row", "mxfp8:scale=rceil", "mxfp4:scale=rceil", "nvfp4",
)  # fmt: skip
"""What is measured if nobody says otherwise."""


@dataclass(frozen=True)
class Candidate:
    """A format with the scale it would have."""

    name: str
    cast: QuantSpec
    """Of granularity row where the scale is of the line that leaves the sum."""

    @property
    def bits(self) -> float:
        """A value, with its share of the scales that are in a block format."""
        name = self.cast.format
        if self.cast.is_block:
            return get_block_format(name).bits_per_value
        return float(get_range_format(name).bits if self.cast.is_range else get_format(name).bits)

    def operand(self, kind: str, role: Role, side: Side) -> QuantSpec:
        """The cast of an operand as a policy says it, in a layer of this kind."""
        scale = self.cast.scale
        if scale is None or scale.granularity != "row":
            return self.cast
        # a policy has x_MK and w_NK, however the weight lies in memory
        free = FREE_AXES["linear" if kind == "linear_kn" else kind][role, side]
        granularity = "tensor" if free == "none" else free
        return QuantSpec(self.cast.format, self.cast.rounding, ScaleSpec(granularity, scale.rule))

    def layer(self, kind: str) -> LayerSpec:
        """All six operands in this format, with fp32 sums."""
        fwd, bwd, grad = (GemmSpec(self.operand(kind, role, "lhs"), self.operand(kind, role, "rhs")) for role in ROLES)
        return LayerSpec(fwd, bwd, grad)


@lru_cache(maxsize=256)
def parse_candidate(text: str) -> Candidate:
    """Raises LpError for a format or a scale that does not exist, with the nearest name."""
    name, _, scale = text.strip().partition(" ")
    try:
        if not (is_block_format(name) or is_range_format(name)):
            get_format(name)
        spec = ScaleSpec.parse(f"{scale.strip()}/amax") if scale else None
        cast = QuantSpec(name, default_rounding(name), spec)
    except FormatError as error:
        known = tuple(dict.fromkeys((*(each.split()[0] for each in COUNTERFACTUALS), *FORMATS, *BLOCK_FORMATS)))
        is_name = not scale or error.what.startswith(f'"{name}"')
        what = f'"{text}" is not a format that could be measured: {error.what}'
        hint = (
            nearest_names(name, known) if is_name else 'Known: tensor, row, column, block[1,128], as in "e4m3 tensor"'
        )
        raise LpError(did_you_mean(what, hint), where="telemetry(counterfactuals=...)") from None
    if cast == IDENTITY or (cast.scale is not None and cast.scale.granularity == "channel"):
        raise LpError(
            f'"{text}" is nothing to measure', where="telemetry(counterfactuals=...)", hint='e.g. "bf16", "e4m3 row"'
        )
    return Candidate(text.strip(), cast)


def parse_candidates(names: Iterable[str]) -> tuple[Candidate, ...]:
    """Each once, in the order given."""
    if isinstance(names, str):
        raise LpError(
            "the formats to measure are a list", where="telemetry(counterfactuals=...)", got=repr(names),
            hint=f'["{names}"]',
        )  # fmt: skip
    return tuple(dict.fromkeys(parse_candidate(each) for each in names))
