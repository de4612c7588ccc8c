"""What one GEMM computes in, as a policy says it: two operands, accumulator, output; a section per role."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar

from pydantic import (
    AliasChoices,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema

from lpcompile.errors import FormatError
from lpcompile.policy.fields import (
    AccumulatorName,
    Count,
    FormatName,
    Section,
    as_refusal,
    one_of,
    refusal,
)
from lpcompile.policy.names import OPERAND_NAMES
from lpcompile.policy.operands import Operand
from runtime.numerics.accumulators import ACCUMULATORS, declines_aligned
from runtime.numerics.block_formats import (
    grid_format,
)
from runtime.numerics.format_kinds import IntFormat
from runtime.numerics.specs import (
    ACCUMULATE_MODELS,
    ACCUMULATE_OVERFLOWS,
    AUTO,
    MAX_ALIGN,
    PRODUCTS,
    ROUNDINGS,
    AccumulateModel,
    AccumulateOverflow,
    AccumulateSpec,
    GemmSpec,
    Product,
    Rounding,
)

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
        for key in {self.LHS, self.RHS} - {"dy"}:
            quantizer = getattr(self, key).quantizer
            if quantizer is not None and quantizer.kind == "grad-scale":
                hint = "rule: delayed, or pact or lsq of an integer format"
                raise refusal("grad-scale is for gradients", got=f"{key}: grad-scale", hint=hint, key=key)
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
