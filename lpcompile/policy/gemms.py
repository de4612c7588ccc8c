"""What one GEMM computes in, as a policy says it: operands and scales, accumulator, output; a section per role."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from lpcompile.errors import FormatError
from lpcompile.policy.fields import (
    AccumulatorName,
    Count,
    FormatName,
    OperandFormatName,
    Section,
    as_refusal,
    as_written,
    one_of,
    refusal,
)
from lpcompile.policy.names import OPERAND_NAMES
from runtime.numerics.accumulators import ACCUMULATORS, declines_aligned
from runtime.numerics.block_formats import (
    BLOCK_FORMATS,
    default_rounding,
    grid_format,
    is_block_format,
)
from runtime.numerics.cast_parts import (
    QUANTIZER_KINDS,
    SIGNS,
    TRANSFORM_KINDS,
    TRANSFORM_ROUNDINGS,
    QuantizerKind,
    QuantizerSpec,
    Signs,
    TransformKind,
    TransformRounding,
    TransformSpec,
)
from runtime.numerics.format_kinds import IntFormat
from runtime.numerics.formats import FORMATS
from runtime.numerics.range_formats import is_range_format
from runtime.numerics.specs import (
    ACCUMULATE_MODELS,
    ACCUMULATE_OVERFLOWS,
    AUTO,
    GRANULARITIES,
    MAX_ALIGN,
    PRODUCTS,
    ROUNDINGS,
    SCALE_RULES,
    AccumulateModel,
    AccumulateOverflow,
    AccumulateSpec,
    GemmSpec,
    Granularity,
    Product,
    QuantSpec,
    Rounding,
    ScaleRule,
    ScaleSpec,
)

PLANNED_QUANTIZERS = ("pact+", "sawb+", "lsq+", "dorefa", "grad-scale")
"""Of the papers, and not built."""


SAID_OTHERWISE = {
    "sawb": "scale: {granularity: tensor, rule: sawb} of int4 or int2",
    "ptq": "format: ptq5, or other bits",
    "psq": "format: psq5, or other bits",
    "bhq": "format: bhq5, or other bits",
    "luq": "format: fp4-luq, rounding: stochastic, scale: {granularity: tensor}",
    "two-phase": "fp4-radix4 for dy in bwd and fp4-radix4-odd in grad",
}
"""What papers call quantizers and has no state: how a policy says it."""


def _refuse_others(given: Any) -> Any:
    if isinstance(given, str) and (how := SAID_OTHERWISE.get(given.lower())):
        raise refusal(f"{given} has no state, and is not a quantizer here", hint=how)
    return given


def _read_block(value: Any) -> Any:
    """Two numbers; one says only how long a group is."""
    size = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if isinstance(size, int) and not isinstance(size, bool):
        raise refusal(
            "a block is rows and columns", got=as_written(value), hint=f"block: [1, {size}] for groups of {size}"
        )
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise refusal("a block is rows and columns", expected="two numbers, such as [1, 128]", got=as_written(value))
    return value


class Scale(Section):
    """How the scale of an operand is chosen. The matrix view of x is (product of leading dims, last dim)."""

    granularity: Annotated[Granularity, one_of("scale granularity", GRANULARITIES)] = "tensor"
    """tensor: one scale. row, column: one per row or column of the matrix view. block: one per `block` tile. channel:
    of a weight, one per output channel or feature."""
    rule: Annotated[ScaleRule, one_of("scale rule", SCALE_RULES, ("delayed", "static", "mse", "learned"))] = "amax"
    """amax: scale = amax / max(format). pow2: the smallest power of two not below that. sawb: of a weight in int4 or
    int2, one per tensor from its moments, so that the mean squared error is least; the largest saturate."""
    block: Annotated[tuple[Count, Count], BeforeValidator(_read_block)] = (1, 128)
    """Rows and columns of a tile, in elements; only with granularity block."""

    @classmethod
    def _hint_for(cls, key: str) -> str:
        is_size = key.lower().replace("-", "_") in ("group_size", "groupsize", "block_size", "group")
        return "A group of 128 along the sum is granularity: block, block: [1, 128]" if is_size else ""

    @model_validator(mode="after")
    def _check_block(self) -> "Scale":
        if "block" in self.model_fields_set and self.granularity != "block":
            raise refusal(
                f'block is set and granularity is "{self.granularity}"', hint="granularity: block", key="block"
            )
        return self

    def spec(self) -> ScaleSpec:
        return ScaleSpec(self.granularity, self.rule, self.block)


class Quantizer(Section):
    """What learns the scale of an operand, of an integer format, one per tensor: its state lives in the model, under
    `_lp.SITE.`, and `lp_parameters(model)` gives its parameters.
    """

    kind: Annotated[
        QuantizerKind, one_of("quantizer", QUANTIZER_KINDS, PLANNED_QUANTIZERS), BeforeValidator(_refuse_others)
    ]
    """pact: a learned clip; an unsigned format clips at 0 below. lsq: a learned step."""
    init: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What the clip of pact or the step of lsq begins as. Default: pact 8; lsq 2 E|x| / sqrt(Qp) of the weight, or of
    the first batch."""

    def spec(self) -> QuantizerSpec:
        return QuantizerSpec(self.kind, self.init)


class Transform(Section):
    """A randomized Hadamard transform of an operand along the sum of its GEMM, before its cast. Both operands of the
    GEMM have the same one, so that it leaves the sum.
    """

    SHORTHAND, EXAMPLES = "kind", TRANSFORM_KINDS

    kind: Annotated[TransformKind, one_of("transform", TRANSFORM_KINDS)]
    """hadamard16: 16 elements are turned together; also of 32, 64 and 128. What is left at the end of an axis is turned
    in powers of two, so that any size goes."""
    signs: Annotated[Signs, one_of("rule of signs", SIGNS)] = "fixed"
    """fixed: Transformer Engine's vector, the same for every layer and step. random: drawn for each call of a GEMM."""
    round: Annotated[TransformRounding, one_of("rounding of a transform", TRANSFORM_ROUNDINGS)] = "fp32"
    """What the transform gives is rounded to: fp32, or bf16, as Transformer Engine does."""

    def spec(self) -> TransformSpec:
        return TransformSpec(self.kind, self.signs, self.round)

    def plain(self) -> str | dict[str, Any]:
        """As a policy file writes it."""
        more = self.model_dump(mode="json", exclude_defaults=True)
        return more if len(more) > 1 else self.kind


class Operand(Section):
    """One operand of a GEMM. A bare format name means that format, its own rounding, and scale 1."""

    SHORTHAND, EXAMPLES = "format", (*FORMATS, *BLOCK_FORMATS)

    format: OperandFormatName
    """Number format: a name of the table, `1-E-M[:bias=B,top=T,subnormals=yes|no]` or `intB`; or `ptqB`, `psqB`,
    `bhqB`, B bits over the range of a tensor, of each sample, of samples mixed. The blocks of a block format lie along
    the sum of each GEMM."""
    rounding: Annotated[Rounding, one_of("rounding", ROUNDINGS)] | None = Field(default=None, validate_default=True)
    """How a value between two of the format is rounded. Default: what the format's row says."""
    scale: Scale | None = None
    """How the scale is chosen. Default: no scaling. A block format makes its own scales and takes none."""
    quantizer: Quantizer | None = None
    """What learns the scale. Default: none, the scale is as `scale` says."""
    transform: Transform | None = None
    """What turns the operand along the sum before the cast. Default: nothing."""

    @field_validator("rounding")
    @classmethod
    def _fill_rounding(cls, value: Rounding | None, info: ValidationInfo) -> Rounding | None:
        return default_rounding(info.data["format"]) if value is None and "format" in info.data else value

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, value: Scale | None, info: ValidationInfo) -> Scale | None:
        name = info.data.get("format", "")
        if value is not None and (is_block_format(name) or is_range_format(name)):
            per = "one per block" if is_block_format(name) else "of the range of what is cast"
            raise refusal(f"{name} makes its own scales, {per}", hint="no scale, or a scalar format")
        return value

    @model_validator(mode="after")
    def _check_quantizer(self) -> "Operand":
        try:
            self.spec()
        except FormatError as error:
            raise as_refusal(error) from None
        return self

    def spec(self) -> QuantSpec:
        assert self.rounding is not None  # filled by _fill_rounding
        scale = self.scale.spec() if self.scale else None
        quantizer = self.quantizer.spec() if self.quantizer else None
        transform = self.transform.spec() if self.transform else None
        return QuantSpec(self.format, self.rounding, scale, quantizer=quantizer, transform=transform)

    def plain(self) -> str | dict[str, Any]:
        """As a policy file writes it, the shorthand where it says everything."""
        values: dict[str, Any] = {"format": self.format}
        if self.rounding != default_rounding(self.format):
            values["rounding"] = self.rounding
        if self.scale:
            unused = None if self.scale.granularity == "block" else {"block"}
            values["scale"] = self.scale.model_dump(mode="json", exclude=unused)
        if self.quantizer:
            values["quantizer"] = self.quantizer.model_dump(mode="json", exclude_none=True)
        if self.transform:
            values["transform"] = self.transform.plain()
        return values if len(values) > 1 else self.format


_FP32 = Operand(format="fp32")


class Accumulate(Section):
    """How a GEMM adds. A bare format name means that format after every add; hopper-fp8, hopper-bf16, blackwell-fp8,
    ada-fp8 and ampere-bf16 mean how that GPU adds, all keys of it.
    """

    SHORTHAND, EXAMPLES = "format", ("fp32", "int32", "dlfloat16", AUTO, *ACCUMULATORS)

    format: AccumulatorName = "fp32"
    """fp32, another float format, or intB for two integer operands. auto: the fewest mantissa bits under which the
    variance retention ratio of the sum's length foresees no swamping, with 8 bits of exponent."""
    chunk: Count | None = None
    """Number of products summed apart before their sum is added to the total; both sums are in `format`."""
    rounding: Annotated[Rounding, one_of("rounding", ROUNDINGS)] | None = None
    """Rounding of every add; omitted: the format's own. Integers add exactly and have none."""
    product: Annotated[Product, one_of("product", PRODUCTS)] = "fma"
    """fma: a product is added unrounded. rounded: it is rounded to `format` first."""
    model: Annotated[AccumulateModel, one_of("model", ACCUMULATE_MODELS)] = "per_mac"
    """per_mac: a rounding after every add. per_chunk: a chunk is summed in fp32 and rounded once. aligned: a chunk and
    the running sum are cut to `align` fraction bits of the largest exponent, added exactly, and cut to `format`."""
    overflow: Annotated[AccumulateOverflow, one_of("rule of overflow", ACCUMULATE_OVERFLOWS)] = "saturate"
    """Of integers: saturate, or wrap as two's complement. Floats saturate."""
    align: Annotated[int, Field(strict=True, gt=0, le=MAX_ALIGN)] | None = None
    """Fraction bits to which an aligned sum cuts its terms; omitted: those of `format`."""

    @model_validator(mode="before")
    @classmethod
    def _expand_name(cls, value: Any) -> Any:
        """The keys that the name of an accumulator stands for."""
        keys = {"format": value} if isinstance(value, str) else value
        if not isinstance(keys, Mapping) or not isinstance(name := keys.get("format"), str):
            return value
        if (row := ACCUMULATORS.get(name.lower().replace("_", "-"))) is None:
            return value
        if len(keys) > 1:
            others = ", ".join(str(key) for key in keys if key != "format")
            raise refusal(f"{row.name} says all of an accumulator", got=f"also {others}", hint=f"{row.name} alone")
        spec = AccumulateSpec.parse(row.text)
        said = {key: getattr(spec, key) for key in cls.model_fields}
        return {key: each for key, each in said.items() if each != cls.model_fields[key].default}

    @model_validator(mode="after")
    def _check_spec(self) -> "Accumulate":
        spec = self.spec()
        if self.chunk is not None and spec == AccumulateSpec("int32", self.chunk):
            raise refusal("integers add exactly, so that chunks change nothing", hint="no chunk", key="chunk")
        return self

    def spec(self) -> AccumulateSpec:
        """Raises a refusal where the keys contradict each other."""
        try:
            how = self.product, self.model, self.overflow, self.align
            return AccumulateSpec(self.format, self.chunk, self.rounding, *how)
        except FormatError as error:
            raise as_refusal(error) from None

    def plain(self) -> str | dict[str, Any]:
        """As a policy file writes it."""
        keys = {
            key: getattr(self, key)
            for key, info in type(self).model_fields.items()
            if getattr(self, key) != info.default and key != "format"
        }
        return {"format": self.format, **keys} if keys else self.format

    def __str__(self) -> str:
        words = str(self.spec()).split(" ")[1:]
        return " ".join([self.format + (f" in chunks of {self.chunk}" if self.chunk else ""), *words])


class Gemm(Section):
    """One GEMM of a rule: two operands, the accumulator, the output. An operand that is not named is fp32."""

    TWINS = {"a": "x", "b": "w"}
    SPELLINGS = {**OPERAND_NAMES, "accumulator": "accumulate", "acc": "accumulate"}
    NOUN = "operand"
    LHS: ClassVar[str]
    RHS: ClassVar[str]

    @classmethod
    def _hint_for(cls, key: str) -> str:
        """No operand is guessed: another one would load."""
        known = list(dict.fromkeys((*cls.model_fields, *cls._twins())))
        close = get_close_matches(key, ("accumulate",), 1, 0.7)
        return (f'"{close[0]}"? ' if close else "") + f"Known: {', '.join(known)}"

    @classmethod
    def _twins(cls) -> list[str]:
        return [twin for twin, key in cls.TWINS.items() if key in cls.model_fields]

    accumulate: Accumulate = Accumulate()
    """What the sums are kept in."""
    out: FormatName = "fp32"
    """Format of the result, rounded once from the accumulator."""

    @model_validator(mode="after")
    def _check_channels(self) -> "Gemm":
        for key in {self.LHS, self.RHS} - {"w"}:
            scale = getattr(self, key).scale
            if scale is not None and scale.granularity == "channel":
                hint = "granularity: row (one scale per token) or column (one per feature)"
                raise refusal("granularity channel is for weights", got=f"{key}: channel", hint=hint, key=key)
            if scale is not None and scale.rule == "sawb":
                raise refusal("rule sawb is for weights", got=f"{key}: sawb", hint="rule: amax, or pact", key=key)
        return self

    @model_validator(mode="after")
    def _check_transforms(self) -> "Gemm":
        first, second = ((key, getattr(self, key).transform) for key in (self.LHS, self.RHS))
        if (first[1] and first[1].spec()) == (second[1] and second[1].spec()):
            return self
        got = " and ".join(f"{key}: {value.spec() if value else 'none'}" for key, value in (first, second))
        key = first[0] if first[1] else second[0]
        what = "a transform leaves a sum whose both operands have the same one"
        raise refusal(what, got=got, hint="one transform on both, or on none", key=key)

    @model_validator(mode="after")
    def _check_accumulator(self) -> "Gemm":
        operands = [getattr(self, key).format for key in (self.LHS, self.RHS)]
        is_integer = self.accumulate.spec().is_integer
        if is_integer and not all(isinstance(grid_format(name), IntFormat) for name in operands):
            got, what = f"{self.LHS}: {operands[0]} and {self.RHS}: {operands[1]}", self.accumulate.format
            raise refusal(f"{what} sums need two integer operands", got=got, hint="accumulate: fp32", key="accumulate")
        if self.accumulate.model == "aligned" and (reason := declines_aligned(self.spec())):
            got = f"{self.LHS}: {operands[0]} and {self.RHS}: {operands[1]}"
            raise refusal(reason, got=got, hint="e4m3, e5m2, bf16 or fp16 in both", key="accumulate")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        properties = handler.resolve_ref_schema(schema)["properties"]
        properties.update({twin: properties[key] for twin, key in cls.TWINS.items() if key in properties})
        return schema

    def spec(self) -> GemmSpec:
        lhs, rhs = getattr(self, self.LHS), getattr(self, self.RHS)
        return GemmSpec(lhs.spec(), rhs.spec(), self.accumulate.spec(), self.out)

    def plain(self, twins: bool = False) -> dict[str, Any]:
        """As a policy file writes it, the accumulator and the output always; `twins`: with a and b for x and w."""
        names = {key: twin for twin, key in self.TWINS.items()} if twins else {}
        operands = {names.get(key, key): getattr(self, key).plain() for key in (self.LHS, self.RHS)}
        return operands | {"accumulate": self.accumulate.plain(), "out": self.out}


class Fwd(Gemm):
    """y = x.w, or y = a.b"""

    LHS, RHS = "x", "w"
    x: Operand = Field(default=_FP32, validation_alias=AliasChoices("x", "a"))
    """The layer's input; `a` in a product of two activations."""
    w: Operand = Field(default=_FP32, validation_alias=AliasChoices("w", "b"))
    """The weight; `b` in a product of two activations."""


class Bwd(Gemm):
    """dx = dy.w, or da = dy.b"""

    LHS, RHS = "dy", "w"
    dy: Operand = _FP32
    """The gradient of the output."""
    w: Operand = Field(default=_FP32, validation_alias=AliasChoices("w", "b"))
    """The weight; `b` in a product of two activations."""


class Grad(Gemm):
    """dw = dy.x, or db = dy.a"""

    LHS, RHS = "dy", "x"
    dy: Operand = _FP32
    """The gradient of the output."""
    x: Operand = Field(default=_FP32, validation_alias=AliasChoices("x", "a"))
    """The layer's input; `a` in a product of two activations."""
