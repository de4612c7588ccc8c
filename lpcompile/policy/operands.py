"""What one operand is cast to, as a policy says it: format, rounding, and how its scale is chosen or followed."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from lpcompile.errors import FormatError
from lpcompile.policy.fields import (
    Count,
    OperandFormatName,
    Section,
    as_refusal,
    as_written,
    one_of,
    refusal,
)
from runtime.numerics.block_formats import BLOCK_FORMATS, default_rounding, is_block_format
from runtime.numerics.formats import FORMATS
from runtime.numerics.quantizer_specs import (
    ALGORITHMS,
    GRAD_SCALE_RULES,
    MAX_HISTORY,
    MAX_MARGIN,
    QUANTIZER_KINDS,
    Algorithm,
    AnyQuantizerSpec,
    DelayedSpec,
    GradScaleRule,
    GradScaleSpec,
    QuantizerKind,
    QuantizerSpec,
)
from runtime.numerics.range_formats import is_range_format
from runtime.numerics.specs import (
    GRANULARITIES,
    ROUNDINGS,
    SCALE_RULES,
    Granularity,
    QuantSpec,
    Rounding,
    ScaleRule,
    ScaleSpec,
)
from runtime.numerics.transform_specs import (
    SIGNS,
    TRANSFORM_KINDS,
    TRANSFORM_ROUNDINGS,
    Signs,
    TransformKind,
    TransformRounding,
    TransformSpec,
)

PLANNED_QUANTIZERS = ("pact+", "sawb+", "lsq+", "dorefa")
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


_RULES = (*SCALE_RULES, "delayed")


class Scale(Section):
    """How the scale of an operand is chosen. The matrix view of x is (product of leading dims, last dim)."""

    granularity: Annotated[Granularity, one_of("scale granularity", GRANULARITIES)] = "tensor"
    """tensor: one scale. row, column: one per row or column of the matrix view. block: one per `block` tile. channel:
    of a weight, one per output channel or feature."""
    rule: Annotated[ScaleRule | Literal["delayed"], one_of("scale rule", _RULES, ("static", "mse", "learned"))] = "amax"
    """amax: scale = amax / max(format). pow2: the smallest power of two not below that. sawb: of a weight in int4 or
    int2, one per tensor from its moments, so that the mean squared error is least; the largest saturate. delayed: amax
    of the steps before, one per tensor; of the tensor itself until there was one."""
    block: Annotated[tuple[Count, Count], BeforeValidator(_read_block)] = (1, 128)
    """Rows and columns of a tile, in elements; only with granularity block."""
    history: Annotated[int, Field(strict=True, ge=1, le=MAX_HISTORY)] = 1024
    """Of a delayed scale: how many steps it looks back."""
    algorithm: Annotated[Algorithm, one_of("algorithm", ALGORITHMS)] = "max"
    """Of a delayed scale: the largest amax of the history, or that of the last step, most_recent."""
    margin: Annotated[int, Field(strict=True, ge=0, le=MAX_MARGIN)] = 0
    """Of a delayed scale: it is 2^margin larger, for values that grow from step to step."""
    per_rank: Annotated[bool, Field(strict=True)] = False
    """Of a delayed scale: true, each data-parallel rank has its own; false, one of the largest amax of all."""

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

    @model_validator(mode="after")
    def _check_delayed(self) -> "Scale":
        said = [key for key in _OF_DELAYED if key in self.model_fields_set]
        if said and self.rule != "delayed":
            raise refusal(f'{said[0]} is set and rule is "{self.rule}"', hint="rule: delayed", key=said[0])
        if self.rule == "delayed" and self.granularity != "tensor":
            got = f"granularity {self.granularity}"
            raise refusal("a delayed scale is one per tensor", got=got, hint="granularity: tensor, or rule: amax")
        return self

    def spec(self) -> ScaleSpec | DelayedSpec:
        if self.rule == "delayed":
            return DelayedSpec(self.history, self.algorithm, self.margin, self.per_rank)
        return ScaleSpec(self.granularity, self.rule, self.block)

    def plain(self) -> dict[str, Any]:
        """As a policy file writes it."""
        unused = {"block"} if self.granularity != "block" else set()
        if self.rule != "delayed":
            unused |= set(_OF_DELAYED)
        return self.model_dump(mode="json", exclude=unused)


_OF_DELAYED = ("history", "algorithm", "margin", "per_rank")


class Quantizer(Section):
    """What has the scale of an operand, one per tensor: its state lives in the model, under `_lp.SITE.`. pact and lsq
    learn it, of an integer format, and `lp_parameters(model)` gives their parameters.
    """

    kind: Annotated[
        QuantizerKind, one_of("quantizer", QUANTIZER_KINDS, PLANNED_QUANTIZERS), BeforeValidator(_refuse_others)
    ]
    """pact: a learned clip; an unsigned format clips at 0 below. lsq: a learned step. grad-scale: of dy, a power of two
    that follows the gradient from step to step."""
    init: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What the clip of pact or the step of lsq begins as. Default: pact 8; lsq 2 E|x| / sqrt(Qp) of the weight, or of
    the first batch."""
    rule: Annotated[GradScaleRule, one_of("rule of grad-scale", GRAD_SCALE_RULES)] = "max-align"
    """Of grad-scale: max-align halves and doubles by what the step's largest gradient was; exact is scale rule pow2;
    dalle grows a little every step and backs off where values saturate."""
    per_rank: Annotated[bool, Field(strict=True)] = False
    """Of grad-scale: whether each data-parallel rank has its own."""

    @model_validator(mode="after")
    def _check_keys(self) -> "Quantizer":
        keys = ("init",) if self.kind == "grad-scale" else ("rule", "per_rank")
        if said := [key for key in keys if key in self.model_fields_set]:
            hint = "without it, or " + ("pact, lsq" if self.kind == "grad-scale" else "grad-scale")
            raise refusal(f"{self.kind} has no {said[0]}", hint=hint, key=said[0])
        return self

    def spec(self) -> AnyQuantizerSpec:
        if self.kind == "grad-scale":
            return GradScaleSpec(self.rule, self.per_rank)
        return QuantizerSpec(self.kind, self.init)

    def plain(self) -> dict[str, Any]:
        """As a policy file writes it."""
        unused = {"init"} if self.kind == "grad-scale" else {"rule", "per_rank"}
        return self.model_dump(mode="json", exclude=unused, exclude_none=True)


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
    """What has the scale, with a state. Default: none, the scale is as `scale` says."""
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
        if not isinstance(scale, DelayedSpec):
            return QuantSpec(self.format, self.rounding, scale, quantizer=quantizer, transform=transform)
        if quantizer is not None:
            got = f"scale {scale} and quantizer {quantizer}"
            raise FormatError("the quantizer is the scale", where=self.format, got=got, hint="one of them")
        return QuantSpec(self.format, self.rounding, quantizer=scale, transform=transform)

    @staticmethod
    def of(spec: QuantSpec) -> "Operand":
        """The operand whose spec this is, but for the way that its blocks lie."""
        values: dict[str, Any] = {"format": spec.format, "rounding": spec.rounding}
        if isinstance(spec.quantizer, DelayedSpec):
            values["scale"] = {"rule": "delayed", **asdict(spec.quantizer)}
        elif spec.quantizer is not None:
            values["quantizer"] = {"kind": spec.quantizer.kind, **asdict(spec.quantizer)}
        elif spec.scale is not None:
            block = {"block": spec.scale.block} if spec.scale.granularity == "block" else {}
            values["scale"] = {"granularity": spec.scale.granularity, "rule": spec.scale.rule, **block}
        if spec.transform is not None:
            values["transform"] = asdict(spec.transform)
        return Operand.model_validate(values)

    def plain(self) -> str | dict[str, Any]:
        """As a policy file writes it, the shorthand where it says everything."""
        values: dict[str, Any] = {"format": self.format}
        if self.rounding != default_rounding(self.format):
            values["rounding"] = self.rounding
        if self.scale:
            values["scale"] = self.scale.plain()
        if self.quantizer:
            values["quantizer"] = self.quantizer.plain()
        if self.transform:
            values["transform"] = self.transform.plain()
        return values if len(values) > 1 else self.format
