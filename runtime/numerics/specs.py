"""Specs: what a cast and a GEMM compute, as frozen values that print and parse.

    QuantSpec   `e4m3 nearest_even row/amax`      one operand: format, rounding, scale
    GemmSpec    `A * B -> fp32 -> fp32`           one GEMM: two operands, accumulator, output
    LayerSpec   `fwd: ...; bwd: ...; grad: ...`   the three GEMMs of a layer

FWD y = x.w (fprop), BWD dx = dy.w (dgrad), GRAD dw = dy.x (wgrad). In each the operands are named as the policy names
them: FWD lhs = x, rhs = w; BWD lhs = dy, rhs = w; GRAD lhs = dy, rhs = x. For a product of two activations y = a.b: FWD
lhs = a, rhs = b; BWD (da = dy.b) lhs = dy, rhs = b; GRAD (db = dy.a) lhs = dy, rhs = a.

Invariants: `QuantSpec.parse(str(spec)) == spec`, and the same for GemmSpec and LayerSpec.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

from runtime.errors import FormatError, nearest_names
from runtime.numerics.formats import get_format

Rounding = Literal["nearest_even", "nearest_away", "toward_zero", "stochastic"]
Granularity = Literal["tensor", "row", "column", "block"]
ScaleRule = Literal["amax", "pow2"]
Role = Literal["fwd", "bwd", "grad"]

ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
ROLES: tuple[Role, ...] = get_args(Role)


def _check(kind: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise FormatError(f'"{value}" is not a {kind}', hint=nearest_names(value, known))


@dataclass(frozen=True)
class ScaleSpec:
    """How the scale of an operand is chosen. The matrix view of x is (product of leading dims, last dim).

    tensor: one scale. row: one per row of the matrix view. column: one per column. block: one per `block` tile.
    amax: scale = amax / max(format), in fp32. pow2: the smallest power of two not below that.
    """

    granularity: Granularity = "tensor"
    rule: ScaleRule = "amax"
    block: tuple[int, int] = (1, 128)

    def __post_init__(self) -> None:
        _check("scale granularity", self.granularity, GRANULARITIES)
        _check("scale rule", self.rule, SCALE_RULES)

    def __str__(self) -> str:
        tile = f"[{self.block[0]},{self.block[1]}]" if self.granularity == "block" else ""
        return f"{self.granularity}{tile}/{self.rule}"

    @staticmethod
    def parse(text: str) -> "ScaleSpec":
        granularity, _, rule = text.partition("/")
        block = (1, 128)
        if "[" in granularity:
            granularity, _, tile = granularity.partition("[")
            rows, _, columns = tile.rstrip("]").partition(",")
            block = (int(rows), int(columns))
        _check("scale granularity", granularity, GRANULARITIES)
        _check("scale rule", rule, SCALE_RULES)
        return ScaleSpec(granularity, rule, block)  # type: ignore[arg-type]


@dataclass(frozen=True)
class QuantSpec:
    """One cast: a number format, its rounding, and how its scale is chosen (None: scale 1)."""

    format: str = "fp32"
    rounding: Rounding = "nearest_even"
    scale: ScaleSpec | None = None

    def __post_init__(self) -> None:
        get_format(self.format)
        _check("rounding", self.rounding, ROUNDINGS)

    @property
    def is_identity(self) -> bool:
        """True for fp32 with no scale: the operand is used as it is, in whatever dtype the model holds it."""
        return self.format == "fp32" and self.scale is None

    def __str__(self) -> str:
        return f"{self.format} {self.rounding}" + (f" {self.scale}" if self.scale else "")

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> "QuantSpec":
        parts = text.split()
        if not 1 <= len(parts) <= 3:
            raise FormatError(f'"{text}" is not a cast', expected="`FORMAT ROUNDING [GRANULARITY/RULE]`")
        rounding = parts[1] if len(parts) > 1 else get_format(parts[0]).rounding
        _check("rounding", rounding, ROUNDINGS)
        scale = ScaleSpec.parse(parts[2]) if len(parts) == 3 else None
        return QuantSpec(parts[0], rounding, scale)  # type: ignore[arg-type]


IDENTITY = QuantSpec()


@dataclass(frozen=True)
class GemmSpec:
    """One GEMM: operand casts, the format it accumulates in (rounded every `chunk` adds' boundary), the format it
    returns.
    """

    lhs: QuantSpec = IDENTITY
    rhs: QuantSpec = IDENTITY
    accumulate: str = "fp32"
    chunk: int | None = None
    out: str = "fp32"

    @property
    def is_identity(self) -> bool:
        return self == _IDENTITY_GEMM

    def __str__(self) -> str:
        chunk = f"/{self.chunk}" if self.chunk else ""
        return f"{self.lhs} * {self.rhs} -> {self.accumulate}{chunk} -> {self.out}"

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> "GemmSpec":
        try:
            operands, accumulate, out = text.split(" -> ")
            lhs, rhs = operands.split(" * ")
        except ValueError as error:
            raise FormatError(f'"{text}" is not a GEMM', expected="`LHS * RHS -> ACCUMULATE[/CHUNK] -> OUT`") from error
        accumulate, _, chunk = accumulate.partition("/")
        return GemmSpec(QuantSpec.parse(lhs), QuantSpec.parse(rhs), accumulate, int(chunk) if chunk else None, out)


_IDENTITY_GEMM = GemmSpec()


@dataclass(frozen=True)
class LayerSpec:
    """The three GEMMs of a layer."""

    fwd: GemmSpec = field(default_factory=GemmSpec)
    bwd: GemmSpec = field(default_factory=GemmSpec)
    grad: GemmSpec = field(default_factory=GemmSpec)

    @property
    def is_identity(self) -> bool:
        return self.fwd.is_identity and self.bwd.is_identity and self.grad.is_identity

    def role(self, role: Role) -> GemmSpec:
        return {"fwd": self.fwd, "bwd": self.bwd, "grad": self.grad}[role]

    def __str__(self) -> str:
        return f"fwd: {self.fwd}; bwd: {self.bwd}; grad: {self.grad}"

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> "LayerSpec":
        parts = dict(part.split(": ", 1) for part in text.split("; "))
        return LayerSpec(**{role: GemmSpec.parse(parts[role]) for role in ROLES})
