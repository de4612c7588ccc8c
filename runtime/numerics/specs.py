"""Specs: what a cast and a GEMM compute, as frozen values that print and parse.

    QuantSpec   `e4m3 nearest_even row/amax`      one operand: format, rounding, scale
                `mxfp8 nearest_even column`       or block format, rounding, which way the blocks lie
                `psq5 stochastic`                 or range format and rounding
                `uint4 nearest_even pact[init=8]` or format, rounding, and the quantizer that has the scale
    AccumulateSpec `1-6-9/64 stochastic`          format, chunk, rounding and kind of the additions
                   `fp32/16 toward_zero aligned[25]` or those of a GPU (accumulators.py has names for them)
    GemmSpec    `A * B -> fp32 -> fp32`           one GEMM: two operands, accumulator, output
    LayerSpec   `fwd: ...; bwd: ...; grad: ...`   the three GEMMs of a layer; `; keep: codes` where backward has codes

FWD y = x.w (fprop), BWD dx = dy.w (dgrad), GRAD dw = dy.x (wgrad). In each the operands are named as the policy names
them: FWD lhs = x, rhs = w; BWD lhs = dy, rhs = w; GRAD lhs = dy, rhs = x. For a product of two activations y = a.b: FWD
lhs = a, rhs = b; BWD (da = dy.b) lhs = dy, rhs = b; GRAD (db = dy.a) lhs = dy, rhs = a.

Invariants: `QuantSpec.parse(str(spec)) == spec`, and the same for GemmSpec and LayerSpec.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal, get_args

from runtime.errors import FormatError, nearest_names
from runtime.numerics.accumulators import ACCUMULATORS
from runtime.numerics.block_formats import EDEN_SPAN, default_rounding, get_block_format, is_block_format
from runtime.numerics.format_kinds import FloatFormat, IntFormat, LookupFormat
from runtime.numerics.formats import get_format
from runtime.numerics.quantizer_specs import AnyQuantizerSpec, QuantizerSpec, check_name, is_quantizer
from runtime.numerics.range_formats import get_range_format, is_range_format
from runtime.numerics.transform_specs import TransformSpec

Rounding = Literal["nearest_even", "nearest_away", "toward_zero", "stochastic"]
Granularity = Literal["tensor", "row", "column", "channel", "block"]
Along = Literal["row", "column", "batched-column"]
ScaleRule = Literal["amax", "pow2", "sawb"]
Role = Literal["fwd", "bwd", "grad"]
Product = Literal["fma", "rounded"]
AccumulateModel = Literal["per_mac", "per_chunk", "aligned"]
AccumulateOverflow = Literal["saturate", "wrap"]
Keep = Literal["grid", "codes"]

ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
ALONG: tuple[Along, ...] = get_args(Along)
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
ROLES: tuple[Role, ...] = get_args(Role)
PRODUCTS: tuple[Product, ...] = get_args(Product)
ACCUMULATE_MODELS: tuple[AccumulateModel, ...] = get_args(AccumulateModel)
ACCUMULATE_OVERFLOWS: tuple[AccumulateOverflow, ...] = get_args(AccumulateOverflow)
KEEPS: tuple[Keep, ...] = get_args(Keep)


MAX_SIZE = 2**31 - 1
"""Of a chunk of a sum, and of a block of a scale in each direction."""
MAX_ALIGNED_CHUNK, MAX_ALIGN = 1024, 28
"""Of an aligned sum: products added at once, and fraction bits that a term keeps."""


@dataclass(frozen=True)
class ScaleSpec:
    """How the scale of an operand is chosen. The matrix view of x is (product of leading dims, last dim).

    tensor: one scale. row: one per row of the matrix view. column: one per column. block: one per `block` tile.
    channel: of a weight, one per output channel, its first dim; a linear layer's is a row or a column of its matrix.
    amax: scale = amax / max(format), in fp32. pow2: the smallest power of two not below that. sawb: of a weight, one
    per tensor from its moments (scaling.py), in int4 or int2; the largest saturate. learned: a quantizer's.
    """

    granularity: Granularity = "tensor"
    rule: ScaleRule | Literal["learned"] = "amax"
    block: tuple[int, int] = (1, 128)

    def __post_init__(self) -> None:
        check_name("scale granularity", self.granularity, GRANULARITIES)
        check_name("scale rule", self.rule, (*SCALE_RULES, "learned"))
        if self.rule == "sawb" and self.granularity != "tensor":
            raise FormatError("sawb is one scale per tensor", got=f"granularity {self.granularity}", hint="tensor")
        if not all(0 < size <= MAX_SIZE for size in self.block):
            raise FormatError("not a block of a scale", expected=f"1 to {MAX_SIZE} each", got=str(self.block))

    def __str__(self) -> str:
        tile = f"[{self.block[0]},{self.block[1]}]" if self.granularity == "block" else ""
        return f"{self.granularity}{tile}/{self.rule}"

    @staticmethod
    def parse(text: str) -> "ScaleSpec":
        granularity, _, rule = text.partition("/")
        block = (1, 128)
        if "[" in granularity:
            granularity, _, tile = granularity.partition("[")
            if not (sizes := re.fullmatch(r"([1-9][0-9]*),([1-9][0-9]*)\]", tile)):
                raise FormatError(f'"{text}": not a block of a scale', expected="block[ROWS,COLUMNS]/RULE", got=tile)
            block = (int(sizes[1]), int(sizes[2]))
        check_name("scale granularity", granularity, GRANULARITIES)
        check_name("scale rule", rule, SCALE_RULES)
        return ScaleSpec(granularity, rule, block)  # type: ignore[arg-type]


SAWB_FORMATS = ("int4", "int2", "ternary")
LEARNED = ScaleSpec("tensor", "learned")
"""The scale of a cast whose quantizer has it; no rule computes it."""


@dataclass(frozen=True)
class QuantSpec:
    """One cast: a number format, its rounding, and how its scale is chosen (None: scale 1).

    A block format makes its own scales, so `scale` is None; its blocks lie `along` the rows of the matrix view, down
    its columns, or down the columns of each matrix of a batch (the last two dims). None, as a policy has it: along the
    sum of the GEMM once there is one, and till then along the rows. A scalar format has no blocks.

    A `quantizer` has the scale, one per tensor, and `scale` is then LEARNED: one that learns by a gradient is for
    integers without a zero point, one that observes for every format that makes no scales of its own.

    A `transform` turns the operand `along` the sum before the cast; scale and grid values are then those of the turned
    operand, and both operands of a GEMM are to be turned alike.
    """

    format: str = "fp32"
    rounding: Rounding = "nearest_even"
    scale: ScaleSpec | None = None
    along: Along | None = None
    quantizer: AnyQuantizerSpec | None = None
    transform: TransformSpec | None = None

    def __post_init__(self) -> None:
        check_name("rounding", self.rounding, ROUNDINGS)
        if self.quantizer is not None:
            self._check_quantizer(self.quantizer)
        elif self.scale == LEARNED:
            raise FormatError("nothing learns this scale", got=str(self.scale), hint="a quantizer, or another scale")
        if self.along is not None:
            check_name("way for blocks to lie", self.along, ALONG)
        if self.scale is not None and self.scale.rule == "sawb" and self.format not in SAWB_FORMATS:
            raise FormatError("sawb is for few levels", got=self.format, hint=" or ".join(SAWB_FORMATS))
        look_up = get_block_format if self.is_block else get_range_format if self.is_range else get_format
        look_up(self.format)  # raises for one that there is not
        if self.along is not None and not self.is_block and self.transform is None:
            raise FormatError(f"{self.format} has no blocks", got=f"along {self.along}", hint="a block format")
        if self.scale is not None and not self.is_elementwise:
            raise FormatError(f"{self.format} makes its own scales", got=str(self.scale), hint="no scale")
        self._check_transform()

    def _check_transform(self) -> None:
        if self.quantizer is not None and self.transform is not None:
            what = "a quantizer that learns sees the operand as it is"
            raise FormatError(what, got=f"{self.quantizer.kind} and {self.transform}", hint="no transform")
        if not self.is_block or get_block_format(self.format).rule != "eden":
            return
        if self.transform is None or self.transform.size != EDEN_SPAN or not self.transform.is_random:
            what = f"{self.format} is unbiased over random rotations of {EDEN_SPAN} elements"
            got, hint = str(self.transform or "no transform"), f"hadamard{EDEN_SPAN} with random signs"
            raise FormatError(what, got=got, hint=hint)

    def _check_quantizer(self, quantizer: AnyQuantizerSpec) -> None:
        where = f"{self.format} with {quantizer.kind}"
        row = get_format(self.format) if self.is_elementwise else None
        if quantizer.learns and (not isinstance(row, IntFormat) or row.zero or row.max < 1):
            what, hint = "a quantizer learns the scale of integers", "int4, uint4, int8, uint8, int4:range=full"
            raise FormatError(what, where=where, expected="an integer format without a zero point", hint=hint)
        if quantizer.learns and self.rounding != "nearest_even":
            got = f"rounding {self.rounding}"
            raise FormatError("a quantizer that learns rounds to nearest-even", where=where, got=got)
        if row is None:
            raise FormatError(f"{self.format} makes its own scales", where=where, hint="a scalar format such as e4m3")
        if self.scale not in (None, LEARNED):
            raise FormatError("the quantizer is the scale", where=where, got=f"scale {self.scale}", hint="no scale")
        object.__setattr__(self, "scale", LEARNED)

    @property
    def observes(self) -> bool:
        """Whether the scale has a state that follows from what is cast, and no gradient."""
        return self.quantizer is not None and not self.quantizer.learns

    @property
    def is_identity(self) -> bool:
        """True for fp32 with no scale: the operand is used as it is, in whatever dtype the model holds it."""
        return self.format == "fp32" and self.scale is None and self.transform is None

    @property
    def is_stochastic(self) -> bool:
        """Whether it draws random bits: for its rounding, or for the signs of its transform."""
        return self.rounding == "stochastic" or (self.transform is not None and self.transform.is_random)

    @property
    def is_block(self) -> bool:
        """Whether the format is a block format: the grid values then hold the scales of the blocks."""
        return is_block_format(self.format)

    @property
    def is_range(self) -> bool:
        """Whether the format is a range format: the grid values then are the values, in fp32."""
        return is_range_format(self.format)

    @property
    def is_elementwise(self) -> bool:
        """Whether a grid value follows from its own x / scale, whatever stands beside it."""
        return not (self.is_block or self.is_range)

    @property
    def has_scale(self) -> bool:
        """Whether grid values are to be multiplied by a scale: a chosen one, or the 1 / S of a two-level format."""
        return self.scale is not None or (self.is_block and get_block_format(self.format).is_two_level)

    @cached_property
    def text(self) -> str:
        """`str(self)`, once: what torch ops take."""
        return str(self)

    def __str__(self) -> str:
        parts = (self.format, self.rounding, self.quantizer or self.scale, self.along, self.transform)
        return " ".join(str(part) for part in parts if part is not None)

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> "QuantSpec":
        parts = text.split()
        if not 1 <= len(parts) <= 5:
            raise FormatError(f'"{text}" is not a cast', expected=CAST_TEXT)
        rounding = parts[1] if len(parts) > 1 else default_rounding(parts[0])
        fields: dict[str, object] = {}
        for word in parts[2:]:
            key = "along" if word in ALONG or is_block_format(parts[0]) else "scale"
            key = "transform" if word.startswith("hadamard") else "quantizer" if is_quantizer(word) else key
            if key in fields:
                raise FormatError(f'"{text}" is not a cast', expected=CAST_TEXT)
            parse = {"transform": TransformSpec.parse, "quantizer": QuantizerSpec.parse, "scale": ScaleSpec.parse}
            fields[key] = parse[key](word) if key in parse else word
        return QuantSpec(parts[0], rounding, **fields)  # type: ignore[arg-type]


CAST_TEXT = "`FORMAT ROUNDING [GRANULARITY/RULE | QUANTIZER] [ALONG] [TRANSFORM]`"
IDENTITY = QuantSpec()
AUTO = "auto"


@dataclass(frozen=True)
class AccumulateSpec:
    """How a GEMM adds: `1-6-9/64 stochastic rounded per_chunk`, what is default not printed.

    reference_gemm.py defines the order of additions and every rounding. `rounding` None is the row's own
    (`mode`); naming the row's own is the same spec. An integer accumulator adds exactly and has no rounding: it
    saturates at the row's ends, or wraps as two's complement of its bits. AUTO for a format leaves it open.
    model aligned: a chunk and the running sum are added at once, in fixed point, as reference_aligned.py defines;
    `align` is its number of fraction bits, None the format's own, and naming the format's own is the same spec.
    """

    format: str = "fp32"
    chunk: int | None = None
    rounding: Rounding | None = None
    product: Product = "fma"
    model: AccumulateModel = "per_mac"
    overflow: AccumulateOverflow = "saturate"
    align: int | None = None

    def __post_init__(self) -> None:
        row = get_format("fp32" if self.is_open else self.format)
        check_name("product", self.product, PRODUCTS)
        check_name("model of accumulation", self.model, ACCUMULATE_MODELS)
        check_name("rule of overflow", self.overflow, ACCUMULATE_OVERFLOWS)
        if self.chunk is not None and (not isinstance(self.chunk, int) or not 0 < self.chunk <= MAX_SIZE):
            wanted = f"a whole number of 1 to {MAX_SIZE}, or None"
            raise FormatError("not a chunk", expected=wanted, got=repr(self.chunk))
        if self.align is not None and self.model != "aligned":
            raise FormatError("only aligned sums are aligned", got=f"align {self.align}", hint="model: aligned")
        if isinstance(row, LookupFormat):
            raise FormatError(f"{self.format} cannot hold a sum", hint="a float or an integer format")
        if isinstance(row, IntFormat):
            if self.rounding is not None:
                raise FormatError("integers add exactly", got=f"rounding {self.rounding}", hint="no rounding")
            if row.bits > 32 or row.zero:
                raise FormatError(f"{self.format} is no accumulator here", expected="at most 32 bits and no zero point")
            if self.model == "aligned":
                raise FormatError("integers add exactly", got="model aligned", hint="fp32 or 1-8-M")
            return
        if self.overflow != "saturate":
            raise FormatError(f"{self.format} saturates", got=f"overflow {self.overflow}", hint="an integer format")
        if self.rounding is not None:
            check_name("rounding", self.rounding, ROUNDINGS)
        if self.rounding == row.rounding:
            object.__setattr__(self, "rounding", None)
        if self.model == "aligned":
            self._check_aligned(row)

    def _check_aligned(self, row: FloatFormat) -> None:
        bits = row.mantissa if self.align is None else self.align
        rules = [
            (not self.is_open, "a format that is stated"),
            ((row.emin, row.emax, row.subnormals) == (-126, 127, True), "fp32 or 1-8-M, with the exponents of fp32"),
            (self.rounding == "toward_zero", "rounding toward_zero"),
            (self.product == "fma", "products that are not rounded first (fma)"),
            (self.chunk is not None and self.chunk <= MAX_ALIGNED_CHUNK, f"a chunk of 1 to {MAX_ALIGNED_CHUNK}"),
            (isinstance(bits, int) and 1 <= bits <= MAX_ALIGN, f"aligned to 1 to {MAX_ALIGN} fraction bits"),
        ]
        for holds, rule in rules:
            if not holds:
                raise FormatError("no aligned sum", expected=rule, got=f"`{self}`")
        if self.align == row.mantissa:
            object.__setattr__(self, "align", None)

    @property
    def align_bits(self) -> int:
        """F of an aligned sum: the fraction bits that a term of the largest exponent keeps."""
        row = get_format(self.format)
        assert isinstance(row, FloatFormat)
        return row.mantissa if self.align is None else self.align

    @property
    def mode(self) -> Rounding:
        """The rounding of every add."""
        row = get_format(self.format)
        return self.rounding or (row.rounding if isinstance(row, FloatFormat) else "nearest_even")

    @property
    def is_integer(self) -> bool:
        return not self.is_open and isinstance(get_format(self.format), IntFormat)

    @property
    def is_open(self) -> bool:
        """Whether the format is still to be chosen (the pass choose-accumulator): such a spec runs nowhere."""
        return self.format == AUTO

    def __str__(self) -> str:
        chunk = f"/{self.chunk}" if self.chunk else ""
        model = self.model if self.align is None else f"{self.model}[{self.align}]"
        words = [self.rounding, *(word for word in (self.product, model, self.overflow) if word not in _DEFAULTS)]
        return " ".join([self.format + chunk, *(word for word in words if word)])

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> "AccumulateSpec":
        """Of a text as `str` gives it, or of a name of ACCUMULATORS."""
        first, *words = (ACCUMULATORS[text].text if text in ACCUMULATORS else text).split()
        name, slash, chunk = first.partition("/")
        if slash and not re.fullmatch(r"[1-9][0-9]*", chunk):
            raise FormatError(f'"{first}": not a chunk', expected="FORMAT/CHUNK, a whole number above 0", got=chunk)
        fields: dict[str, str | int] = {}
        for word in words:
            if aligned := re.fullmatch(r"aligned\[([1-9][0-9]?)\]", word):
                word, fields["align"] = "aligned", int(aligned[1])
            owners = [key for key, known in _ACCUMULATE_WORDS.items() if word in known]
            if not owners or owners[0] in fields:
                known = tuple(word for words in _ACCUMULATE_WORDS.values() for word in words)
                raise FormatError(f'"{word}" does not describe an accumulator', hint=nearest_names(word, known))
            fields[owners[0]] = word
        return AccumulateSpec(name, int(chunk) if chunk else None, **fields)  # type: ignore[arg-type]


_ACCUMULATE_WORDS: dict[str, tuple[str, ...]] = {
    "rounding": ROUNDINGS,
    "product": PRODUCTS,
    "model": ACCUMULATE_MODELS,
    "overflow": ACCUMULATE_OVERFLOWS,
}
_DEFAULTS = ("fma", "per_mac", "saturate")
FP32_SUMS = AccumulateSpec()


@dataclass(frozen=True)
class GemmSpec:
    """One GEMM: operand casts, how it accumulates, the format it returns."""

    lhs: QuantSpec = IDENTITY
    rhs: QuantSpec = IDENTITY
    accumulator: AccumulateSpec = FP32_SUMS
    out: str = "fp32"

    @property
    def accumulate(self) -> str:
        """The accumulator's format."""
        return self.accumulator.format

    @property
    def chunk(self) -> int | None:
        return self.accumulator.chunk

    @property
    def is_identity(self) -> bool:
        return self == _IDENTITY_GEMM

    @property
    def is_stochastic(self) -> bool:
        """Whether a cast or an addition draws random bits."""
        return self.lhs.is_stochastic or self.rhs.is_stochastic or self.accumulator.rounding == "stochastic"

    @cached_property
    def swapped(self) -> "GemmSpec":
        """That of the transposed product."""
        return replace(self, lhs=self.rhs, rhs=self.lhs)

    def __str__(self) -> str:
        return f"{self.lhs} * {self.rhs} -> {self.accumulator} -> {self.out}"

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> "GemmSpec":
        try:
            operands, accumulate, out = text.split(" -> ")
            lhs, rhs = operands.split(" * ")
        except ValueError as error:
            raise FormatError(f'"{text}" is not a GEMM', expected="`LHS * RHS -> ACCUMULATE[/CHUNK] -> OUT`") from error
        return GemmSpec(QuantSpec.parse(lhs), QuantSpec.parse(rhs), AccumulateSpec.parse(accumulate), out)


_IDENTITY_GEMM = GemmSpec()


@dataclass(frozen=True)
class LayerSpec:
    """The three GEMMs of a layer, and what forward keeps of the operands that backward reads: grid values or codes."""

    fwd: GemmSpec = field(default_factory=GemmSpec)
    bwd: GemmSpec = field(default_factory=GemmSpec)
    grad: GemmSpec = field(default_factory=GemmSpec)
    keep: Keep = "grid"

    @property
    def is_identity(self) -> bool:
        return self.fwd.is_identity and self.bwd.is_identity and self.grad.is_identity

    @property
    def is_stochastic(self) -> bool:
        """Whether a cast or an addition of one of them draws random bits."""
        return any(self.role(role).is_stochastic for role in ROLES)

    @cached_property
    def observes(self) -> bool:
        """Whether the scale of an operand follows from what was cast in earlier steps."""
        return any(each.observes for role in ROLES for each in (self.role(role).lhs, self.role(role).rhs))

    def role(self, role: Role) -> GemmSpec:
        return {"fwd": self.fwd, "bwd": self.bwd, "grad": self.grad}[role]

    def having(self, gemms: Mapping[Role, GemmSpec]) -> "LayerSpec":
        return replace(self, **{str(role): gemm for role, gemm in gemms.items()})  # type: ignore[arg-type]

    def __str__(self) -> str:
        kept = "" if self.keep == "grid" else f"; keep: {self.keep}"
        return f"fwd: {self.fwd}; bwd: {self.bwd}; grad: {self.grad}{kept}"

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> "LayerSpec":
        parts = dict(part.split(": ", 1) for part in text.split("; "))
        keep = parts.get("keep", "grid")
        check_name("way to keep operands", keep, KEEPS)
        fwd, bwd, grad = (GemmSpec.parse(parts[role]) for role in ROLES)
        return LayerSpec(fwd, bwd, grad, keep)  # type: ignore[arg-type]
