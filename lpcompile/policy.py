"""Policy: which number format, scale, rounding and accumulator each GEMM of a model computes in.

    Policy = rules in order + what is not per GEMM (update, loss scale, wire, schedule)
    policy.resolve(sites)  ->  one LayerSpec per site, or None where no rule says anything

Rules resolve per role: the first rule that matches a site and sets `fwd` decides the site's fwd; likewise bwd and grad.
A role that no matching rule sets is fp32; a site for which no role is set is left alone (None).

A product of two activations y = a.b has the slots of a layer under other names: a is x, b is w. Either spelling is
read, x and w are kept, and a rule for `matmul` alone prints a and b.

Invariants: `load_policy(file with policy.to_yaml()) == policy`; equal policies have equal `hash`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from lpcompile.errors import FormatError, LpError, NotSupported, PolicyError, did_you_mean, nearest_names
from runtime.numerics.block_formats import (
    BLOCK_FORMATS,
    default_rounding,
    get_block_format,
    grid_format,
    is_block_format,
)
from runtime.numerics.formats import FORMATS, IntFormat, get_format
from runtime.numerics.specs import (
    ACCUMULATE_MODELS,
    ACCUMULATE_OVERFLOWS,
    AUTO,
    GRANULARITIES,
    PRODUCTS,
    ROLES,
    ROUNDINGS,
    SCALE_RULES,
    AccumulateModel,
    AccumulateOverflow,
    AccumulateSpec,
    GemmSpec,
    Granularity,
    LayerSpec,
    Product,
    QuantSpec,
    Role,
    Rounding,
    ScaleRule,
    ScaleSpec,
)

OPS = (
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "matmul",
    "embedding",
)
"""What `match.op` may name. `linear`: also GPT-2's Conv1D, a linear layer. `matmul`: any product of two activations."""

POSITIONS = ("first", "last")


@dataclass(frozen=True)
class Site:
    """One place of a model where a policy decides something."""

    name: str
    """Path of the module, or of the functional GEMM below it."""
    op: str
    """One of OPS."""
    index: int | None
    """Registration order among the GEMM-bearing leaves; None for a functional GEMM."""
    count: int
    """Number of GEMM-bearing leaves of the model."""
    n: int | None
    """Output features of one sample row, where known."""
    k: int | None
    """Length of the reduction of FWD, where known."""


@dataclass(frozen=True)
class Resolution:
    """What a policy means for the sites of one model."""

    specs: dict[str, LayerSpec | None]
    """Site name -> its three GEMMs; None: no rule sets any role, the op is left alone."""
    rule_of: dict[str, dict[Role, str]]
    """Site name -> role -> the rule that decided it; a role that no rule sets is not in it."""
    unmatched: list[str]
    """One sentence per rule that matched no site."""


@dataclass(frozen=True)
class Origin:
    """Where a rule was written: `policy.yaml:12: rules[1]`. Rules that say the same are equal wherever they stand."""

    text: str = field(default="", compare=False)


# Values and their checks


def _refusal(what: str, *, expected: str = "", got: str = "", hint: str = "", key: str = "") -> PydanticCustomError:
    """A PolicyError in the making: pydantic adds the key path, Policy the file and line."""
    parts = {"what": what, "expected": expected, "got": got, "hint": hint, "key": key}
    return PydanticCustomError("policy", "{what}", parts)


def _not_built(what: str, hint: str, key: str = "") -> PydanticCustomError:
    """A NotSupported in the making."""
    parts = {"what": what, "expected": "", "got": "", "hint": hint, "key": key}
    return PydanticCustomError("not_supported", "{what}", parts)


def _check_format(name: str) -> str:
    try:
        get_format(name)
    except NotSupported as error:
        raise _not_built(error.what, error.hint) from None
    except FormatError as error:
        what = did_you_mean(error.what, error.hint) if error.hint else error.what
        raise _refusal(what, expected=error.expected, got=error.got) from None
    return name


def _one_of(kind: str, known: tuple[str, ...], planned: tuple[str, ...] = ()) -> BeforeValidator:
    """A check that a word is one of `known`; one of `planned` is NotSupported."""

    def check(value: Any) -> Any:
        if value in planned:
            raise _not_built(f'{kind} "{value}" is planned and not in this version', f"one of {', '.join(known)}")
        if value not in known:
            raise _refusal(did_you_mean(f'"{value}" is not a {kind}', nearest_names(str(value), known)))
        return value

    return BeforeValidator(check)


def _words(kind: str, known: tuple[str, ...] = ()) -> BeforeValidator:
    """A check and a widening: one word stands for a list of one, the list is not empty, each word is one of `known`."""

    def check(value: Any) -> Any:
        words = (value,) if isinstance(value, str) else value
        if not isinstance(words, Sequence) or not words or not all(isinstance(word, str) for word in words):
            raise _refusal(f"not {_a(kind)} or a list of them", got=_text(value))
        for word in words:
            if known and word not in known:
                raise _refusal(did_you_mean(f'"{word}" is not {_a(kind)}', nearest_names(word, known)))
        return tuple(words)

    return BeforeValidator(check)


def _words_schema(known: tuple[str, ...] = ()) -> WithJsonSchema:
    word = {"type": "string", "enum": list(known)} if known else {"type": "string"}
    return WithJsonSchema({"anyOf": [word, {"type": "array", "items": word, "minItems": 1}]})


def _check_operand_format(name: str) -> str:
    if not is_block_format(name):
        return _check_format(name)
    try:
        get_block_format(name)
    except FormatError as error:
        raise _refusal(error.what, expected=error.expected, got=error.got, hint=error.hint) from None
    return name


FormatName = Annotated[
    str,
    AfterValidator(_check_format),
    WithJsonSchema({"type": "string", "examples": list(FORMATS)}),
]
OperandFormatName = Annotated[
    str,
    AfterValidator(_check_operand_format),
    WithJsonSchema({"type": "string", "examples": [*FORMATS, *BLOCK_FORMATS]}),
]
AccumulatorName = Annotated[
    str,
    AfterValidator(lambda name: name if name == AUTO else _check_format(name)),
    WithJsonSchema({"type": "string", "examples": [AUTO, *FORMATS]}),
]
Count = Annotated[int, Field(strict=True, gt=0)]
Flag = Annotated[bool, Field(strict=True)]


def _or_text(schema: dict[str, Any], handler: GetJsonSchemaHandler, text: dict[str, Any]) -> dict[str, Any]:
    """Let the JSON Schema of a section also accept its shorthand."""
    resolved = handler.resolve_ref_schema(schema)
    section = dict(resolved)
    description = section.pop("description", "")
    resolved.clear()
    resolved.update({"description": description, "anyOf": [text, section]})
    return schema


class Section(BaseModel):
    """A mapping of the policy file: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    TWINS: ClassVar[dict[str, str]] = {}
    """Second names of keys: {"a": "x"} reads `a` as `x`."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            known = (*cls.model_fields, *(twin for twin, key in cls.TWINS.items() if key in cls.model_fields))
            for key in value:
                if key not in known:
                    hint = cls._hint_for(str(key)) or nearest_names(str(key), known)
                    raise _refusal(did_you_mean(f'"{key}" is not a key here', hint), key=str(key))
                if key in cls.TWINS and cls.TWINS[key] in value:
                    raise _refusal(f'"{key}" and "{cls.TWINS[key]}" name the same operand', hint="one of them", key=key)
        elif not isinstance(value, cls):
            raise _refusal("not a mapping", expected=f"the keys {', '.join(cls.model_fields)}", got=_text(value))
        return value

    @classmethod
    def _hint_for(cls, key: str) -> str:
        """What to say about an unknown key that people write on purpose."""
        return ""


# One operand and one GEMM


class Scale(Section):
    """How the scale of an operand is chosen. The matrix view of x is (product of leading dims, last dim)."""

    granularity: Annotated[Granularity, _one_of("scale granularity", GRANULARITIES)] = "tensor"
    """tensor: one scale. row, column: one per row or column of the matrix view. block: one per `block` tile."""
    rule: Annotated[ScaleRule, _one_of("scale rule", SCALE_RULES, ("delayed", "static", "mse", "learned"))] = "amax"
    """amax: scale = amax / max(format). pow2: the smallest power of two not below that."""
    block: tuple[Count, Count] = (1, 128)
    """Rows and columns of a tile, in elements; only with granularity block."""

    @model_validator(mode="after")
    def _check_block(self) -> "Scale":
        if "block" in self.model_fields_set and self.granularity != "block":
            raise _refusal(
                f'block is set and granularity is "{self.granularity}"', hint="granularity: block", key="block"
            )
        return self

    def spec(self) -> ScaleSpec:
        return ScaleSpec(self.granularity, self.rule, self.block)


class Operand(Section):
    """One operand of a GEMM. A bare format name means that format, its own rounding, and scale 1."""

    format: OperandFormatName
    """Number format: a name of the table, `1-E-M[:bias=B,top=T,subnormals=yes|no]` or `intB`. The blocks of a block
    format lie along the sum of each GEMM."""
    rounding: Annotated[Rounding, _one_of("rounding", ROUNDINGS)] | None = Field(default=None, validate_default=True)
    """How a value between two of the format is rounded. Default: what the format's row says."""
    scale: Scale | None = None
    """How the scale is chosen. Default: no scaling. A block format makes its own scales and takes none."""
    quantizer: Any = None
    """Learned or fitted clipping. Not built in this version: refused."""
    transform: Any = None
    """Rotation before the cast. Not built in this version: refused."""

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, value: Any) -> Any:
        return {"format": value} if isinstance(value, str) else value

    @field_validator("rounding")
    @classmethod
    def _fill_rounding(cls, value: Rounding | None, info: ValidationInfo) -> Rounding | None:
        return default_rounding(info.data["format"]) if value is None and "format" in info.data else value

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, value: Scale | None, info: ValidationInfo) -> Scale | None:
        name = info.data.get("format", "")
        if value is not None and is_block_format(name):
            raise _refusal(f"{name} makes its own scales, one per block", hint="no scale, or a scalar format")
        return value

    @field_validator("quantizer", "transform")
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> None:
        if value is not None:
            raise _not_built(
                f"{info.field_name} is not in this version", "format, rounding and scale (rule amax or pow2)"
            )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return _or_text(handler(core_schema), handler, {"type": "string", "examples": [*FORMATS, *BLOCK_FORMATS]})

    def spec(self) -> QuantSpec:
        assert self.rounding is not None  # filled by _fill_rounding
        return QuantSpec(self.format, self.rounding, self.scale.spec() if self.scale else None)

    def plain(self) -> str | dict[str, Any]:
        """As a policy file writes it, the shorthand where it says everything."""
        values: dict[str, Any] = {"format": self.format}
        if self.rounding != default_rounding(self.format):
            values["rounding"] = self.rounding
        if self.scale:
            unused = None if self.scale.granularity == "block" else {"block"}
            values["scale"] = self.scale.model_dump(mode="json", exclude=unused)
        return values if len(values) > 1 else self.format


_FP32 = Operand(format="fp32")


class Accumulate(Section):
    """How a GEMM adds. A bare format name means that format after every add."""

    format: AccumulatorName = "fp32"
    """fp32, another float format, or intB for two integer operands. auto: the fewest mantissa bits under which the
    variance retention ratio of the sum's length foresees no swamping, with 8 bits of exponent."""
    chunk: Count | None = None
    """Number of products summed apart before their sum is added to the total; both sums are in `format`."""
    rounding: Annotated[Rounding, _one_of("rounding", ROUNDINGS)] | None = None
    """Rounding of every add; omitted: the format's own. Integers add exactly and have none."""
    product: Annotated[Product, _one_of("product", PRODUCTS)] = "fma"
    """fma: a product is added unrounded. rounded: it is rounded to `format` first."""
    model: Annotated[AccumulateModel, _one_of("model", ACCUMULATE_MODELS)] = "per_mac"
    """per_mac: a rounding after every add. per_chunk: a chunk is summed in fp32 and rounded once."""
    overflow: Annotated[AccumulateOverflow, _one_of("rule of overflow", ACCUMULATE_OVERFLOWS)] = "saturate"
    """Of integers: saturate, or wrap as two's complement. Floats saturate."""

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, value: Any) -> Any:
        return {"format": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_spec(self) -> "Accumulate":
        spec = self.spec()
        if self.chunk is not None and spec == AccumulateSpec("int32", self.chunk):
            raise _refusal("integers add exactly, so that chunks change nothing", hint="no chunk", key="chunk")
        return self

    def spec(self) -> AccumulateSpec:
        """Raises a refusal where the keys contradict each other."""
        try:
            return AccumulateSpec(self.format, self.chunk, self.rounding, self.product, self.model, self.overflow)
        except FormatError as error:
            raise _refusal(error.what, expected=error.expected, got=error.got, hint=error.hint) from None

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

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return _or_text(
            handler(core_schema), handler, {"type": "string", "examples": ["fp32", "int32", "dlfloat16", AUTO]}
        )


class _Gemm(Section):
    """One GEMM of a rule: two operands, the accumulator, the output. An operand that is not named is fp32."""

    TWINS = {"a": "x", "b": "w"}
    LHS: ClassVar[str]
    RHS: ClassVar[str]

    accumulate: Accumulate = Accumulate()
    """What the sums are kept in."""
    out: FormatName = "fp32"
    """Format of the result, rounded once from the accumulator."""

    @model_validator(mode="after")
    def _check_accumulator(self) -> "_Gemm":
        operands = [getattr(self, key).format for key in (self.LHS, self.RHS)]
        is_integer = self.accumulate.spec().is_integer
        if is_integer and not all(isinstance(grid_format(name), IntFormat) for name in operands):
            got, what = f"{self.LHS}: {operands[0]} and {self.RHS}: {operands[1]}", self.accumulate.format
            raise _refusal(f"{what} sums need two integer operands", got=got, hint="accumulate: fp32", key="accumulate")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
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


class Fwd(_Gemm):
    """y = x.w, or y = a.b"""

    LHS, RHS = "x", "w"
    x: Operand = Field(default=_FP32, validation_alias=AliasChoices("x", "a"))
    """The layer's input; `a` in a product of two activations."""
    w: Operand = Field(default=_FP32, validation_alias=AliasChoices("w", "b"))
    """The weight; `b` in a product of two activations."""


class Bwd(_Gemm):
    """dx = dy.w, or da = dy.b"""

    LHS, RHS = "dy", "w"
    dy: Operand = _FP32
    """The gradient of the output."""
    w: Operand = Field(default=_FP32, validation_alias=AliasChoices("w", "b"))
    """The weight; `b` in a product of two activations."""


class Grad(_Gemm):
    """dw = dy.x, or db = dy.a"""

    LHS, RHS = "dy", "x"
    dy: Operand = _FP32
    """The gradient of the output."""
    x: Operand = Field(default=_FP32, validation_alias=AliasChoices("x", "a"))
    """The layer's input; `a` in a product of two activations."""


# Rules


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    ">=": lambda size, bound: size >= bound,
    "<=": lambda size, bound: size <= bound,
    "==": lambda size, bound: size == bound,
    "!=": lambda size, bound: size != bound,
    ">": lambda size, bound: size > bound,
    "<": lambda size, bound: size < bound,
}


def _read_bound(value: Any) -> Any:
    """`">=64"`, or a bare size for `"==64"`."""
    text = f"=={value}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace(" ", "")
    sign = next((sign for sign in _COMPARISONS if text.startswith(sign)), "")
    if not sign or not text.removeprefix(sign).isdecimal():
        expected = f"a size such as 64 or a comparison such as >=64 (one of {' '.join(_COMPARISONS)})"
        raise _refusal(f'"{value}" is not a bound', expected=expected)
    return text


Bound = Annotated[
    str | None,
    BeforeValidator(lambda value: None if value is None else _read_bound(value)),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^ *(>=|<=|==|!=|>|<) *[0-9]+ *$"}]}),
]


class Shape(Section):
    """Bounds on the sizes of FWD, an (m, k) by (k, n) product. A size that is not known fulfils no bound."""

    n: Bound = None
    """Output features, for example ">=64"."""
    k: Bound = None
    """Length of the reduction, for example ">=64"."""

    @classmethod
    def _hint_for(cls, key: str) -> str:
        return "m is not known when a model is compiled; n and k are" if key == "m" else ""

    def matches(self, site: Site) -> bool:
        return all(_fulfils(size, bound) for size, bound in ((site.n, self.n), (site.k, self.k)) if bound is not None)


def _fulfils(size: int | None, bound: str) -> bool:
    sign = next(sign for sign in _COMPARISONS if bound.startswith(sign))
    return size is not None and _COMPARISONS[sign](size, int(bound.removeprefix(sign)))


class Match(Section):
    """Which sites a rule is for: all of the conditions hold. No condition: every site."""

    name: str = "*"
    """Glob on the whole module path; `*` also crosses dots."""
    op: Annotated[tuple[str, ...], _words("op", OPS), _words_schema(OPS)] = ()
    """One op or a list of them. Default: every op."""
    position: Annotated[tuple[str, ...], _words("position", POSITIONS), _words_schema(POSITIONS)] = ()
    """first, last or both, by registration order of the GEMM-bearing leaves; functional GEMMs are not counted."""
    shape: Shape | None = None
    """Bounds on n and k."""

    def matches(self, site: Site) -> bool:
        if not fnmatchcase(site.name, self.name) or (self.op and site.op not in self.op):
            return False
        places = {"first": 0, "last": site.count - 1}
        if self.position and site.index not in [places[position] for position in self.position]:
            return False
        return self.shape is None or self.shape.matches(site)

    def plain(self) -> dict[str, Any]:
        """As a policy file writes it."""
        values = self.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
        return {
            key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in values.items()
        }

    def __str__(self) -> str:
        if not (conditions := self.plain()):
            return "every GEMM"
        texts = {"op": "|".join(self.op), "position": "|".join(self.position)}
        texts["shape"] = ", ".join(f"{key} {bound}" for key, bound in conditions.get("shape", {}).items())
        return ", ".join(
            texts["shape"] if key == "shape" else f"{key} {texts.get(key, value)}" for key, value in conditions.items()
        )


class Rule(Section):
    """What the GEMMs of the sites it matches compute in. A role it does not name is left to the rules below it."""

    match: Match = Match()
    """Which sites the rule is for. Default: all."""
    fwd: Fwd | None = None
    """y = x.w"""
    bwd: Bwd | None = None
    """dx = dy.w"""
    grad: Grad | None = None
    """dw = dy.x"""

    _origin: Origin = PrivateAttr(default=Origin())

    @model_validator(mode="after")
    def _check_roles(self) -> "Rule":
        if all(self.role(role) is None for role in ROLES):
            raise _refusal("the rule sets no role", expected=f"at least one of {', '.join(ROLES)}")
        return self

    def role(self, role: Role) -> _Gemm | None:
        return {"fwd": self.fwd, "bwd": self.bwd, "grad": self.grad}[role]

    def plain(self) -> dict[str, Any]:
        """As a policy file writes it."""
        match = self.match.plain()
        tables = {role: gemm.plain(twins=self.match.op == ("matmul",)) for role in ROLES if (gemm := self.role(role))}
        return ({"match": _Inline(match)} if match else {}) | {role: _table(table) for role, table in tables.items()}


# What is not per GEMM


class Update(Section):
    """The weight update."""

    master: FormatName = "fp32"
    """Format of the master weights. This version: fp32."""
    momentum: FormatName = "fp32"
    """Format of the optimizer's moments. This version: fp32."""
    rounding: Annotated[Rounding, _one_of("rounding", ROUNDINGS)] = "nearest_even"
    """Rounding of the update. This version: nearest_even."""

    @field_validator("master", "momentum", "rounding")
    @classmethod
    def _check_built(cls, value: str, info: ValidationInfo) -> str:
        works = "nearest_even" if info.field_name == "rounding" else "fp32"
        if value != works:
            raise _not_built(f"{info.field_name} {value} is not in this version", f"{info.field_name}: {works}")
        return value


class LossScale(Section):
    """The factor on the loss that lifts gradients into their format's range; they are unscaled before clipping."""

    kind: Annotated[Literal["none", "static", "dynamic"], _one_of("loss scale", ("none", "static", "dynamic"))]
    """none: 1. static: `init` throughout. dynamic: from `init`, down on overflow, up after `interval` good steps."""
    init: float = Field(default=65536.0, gt=0, allow_inf_nan=False)
    """First scale. Measured: 1-5-2 gradients end 50% above fp32's loss without, 0.2% with 65536."""
    growth: float = Field(default=2.0, gt=1, allow_inf_nan=False)
    """Factor on the scale after `interval` steps without overflow; a power of two changes no bits."""
    backoff: float = Field(default=0.5, gt=0, lt=1)
    """Factor on the scale after an overflow."""
    interval: Count = 2000
    """Steps without overflow before the scale grows."""
    min: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The scale never falls below this."""


class Wire(Section):
    """What gradients travel in between ranks; sums are fp32. Absent: uncompressed."""

    format: FormatName
    """Format of the payload; fp32: uncompressed."""
    block: Count = 256
    """Elements that share a scale."""
    hierarchical: Literal["auto"] | Flag = "auto"
    """Two steps, inside a node and between nodes. true is not built in this version: refused. auto, false: flat."""
    error_feedback: Flag = False
    """Add what a step rounded away to the next one. Not built in this version: refused."""
    min_numel: Annotated[int, Field(strict=True, ge=0)] = 1024
    """Tensors with fewer elements, and 1-D ones, travel uncompressed."""

    @field_validator("hierarchical", mode="before")
    @classmethod
    def _check_hierarchical(cls, value: Any) -> Any:
        if value is True:
            raise _not_built("hierarchical: true is not in this version", "hierarchical: auto or false")
        if value is not False and value != "auto":
            raise _refusal(f"{_text(value)} is not a value of hierarchical", expected="auto, true or false")
        return value

    @field_validator("error_feedback")
    @classmethod
    def _check_error_feedback(cls, value: bool) -> bool:
        if value:
            raise _not_built("error_feedback: true is not in this version", "error_feedback: false")
        return value


class PhasePolicy(Section):
    """The rules of a phase: a name, and once loaded the rules behind it."""

    name: str
    """A shipped name, or a path relative to the file."""
    rules: tuple[Rule, ...] | None = None
    """Its rules, filled when the policy is loaded."""

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return _or_text(handler(core_schema), handler, {"type": "string"})


class Phase(Section):
    """From which optimizer step on which rules hold."""

    from_step: Annotated[int, Field(strict=True, ge=0)]
    """First optimizer step of the phase."""
    policy: PhasePolicy | None = None
    """Whose rules hold. Only its rules: update, loss scale and wire stay this policy's. Default: its own rules."""


class Policy(Section):
    """Which number format, scale, rounding and accumulator each GEMM of a model computes in."""

    version: Literal[1] = 1
    """Version of the policy language."""
    name: str = "policy"
    """What reports call the policy. Default in a file: the file's name."""
    source: str = ""
    """Where the recipe comes from."""
    extends: Annotated[tuple[str, ...], _words("policy name"), _words_schema()] = ()
    """Shipped names, or paths relative to the file. Own rules come before inherited ones, own values over inherited."""
    rules: tuple[Rule, ...] = ()
    """In order; per role the first rule that matches a GEMM and sets the role decides it."""
    update: Update = Update()
    """The weight update."""
    loss_scale: LossScale = LossScale(kind="none")
    """The loss scale. Default: none."""
    wire: Wire | None = None
    """Gradient compression. Default: none."""
    schedule: tuple[Phase, ...] = ()
    """Which rules hold from which optimizer step on; one entry starts at 0. Default: these rules from the start."""
    elementwise: Any = None
    """Format of everything that is not a GEMM. Not built in this version: refused."""
    calibrate: Any = None
    """How static scales are found. Not built in this version: refused."""
    kv_cache: Any = None
    """Format of the attention cache. Not built in this version: refused."""

    @model_validator(mode="wrap")
    @classmethod
    def _say_where(cls, value: Any, handler: ModelWrapValidatorHandler["Policy"], info: ValidationInfo) -> "Policy":
        """Turn pydantic's list of errors into the first one, as a sentence with its place."""
        try:
            return handler(value)
        except ValidationError as error:
            locate: Callable[[tuple[str | int, ...]], tuple[str, int]]
            locate = (info.context or {}).get("locate", lambda path: ("policy", 0))
            faults = [(_path_in(value, fault), fault) for fault in error.errors()]
            path, fault = min(faults, key=lambda item: locate(item[0])[1])
            raise _as_error(fault, ": ".join(filter(None, (locate(path)[0], key_path(path))))) from None

    @field_validator("version", mode="before")
    @classmethod
    def _check_version(cls, value: Any) -> Any:
        if value != 1 or isinstance(value, bool):
            raise _refusal(f"version {value} is not one this program reads", expected="1")
        return value

    @field_validator("elementwise", "calibrate", "kv_cache")
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> None:
        if value is not None:
            raise _not_built(
                f"{info.field_name} is not in this version", "rules for GEMMs, loss_scale, wire and schedule"
            )

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, value: tuple[Phase, ...]) -> tuple[Phase, ...]:
        steps = sorted(phase.from_step for phase in value)
        if steps and steps[0] != 0:
            raise _refusal(
                "no rules hold at step 0", expected="an entry with from_step: 0", got=f"from_step: {steps[0]}"
            )
        for step, following in pairwise(steps):
            if step == following:
                raise _refusal(f"two entries start at step {step}", expected="one entry per step")
        return value

    def resolve(self, sites: Sequence[Site]) -> Resolution:
        """The LayerSpec of each site under `rules`; of a phase, ask the policy of that phase."""
        self._check_linked()
        labels = [rule._origin.text or f"rules[{index}]" for index, rule in enumerate(self.rules)]
        matching = {site.name: [i for i, rule in enumerate(self.rules) if rule.match.matches(site)] for site in sites}
        specs: dict[str, LayerSpec | None] = {}
        rule_of: dict[str, dict[Role, str]] = {}
        for name, indices in matching.items():
            gemms: dict[Role, GemmSpec] = {}
            rule_of[name] = {}
            for role in ROLES:
                for index in indices:
                    if gemm := self.rules[index].role(role):
                        gemms[role] = gemm.spec()
                        rule_of[name][role] = labels[index]
                        break
            specs[name] = LayerSpec(**gemms) if gemms else None
        used = {index for indices in matching.values() for index in indices}
        unmatched = [
            f"{label} ({rule.match}) matched none of the {len(sites)} GEMMs"
            for index, (label, rule) in enumerate(zip(labels, self.rules))
            if index not in used
        ]
        return Resolution(specs, rule_of, unmatched)

    @property
    def phases(self) -> list[tuple[int, "Policy"]]:
        """(first step, policy), sorted by step. The policies differ in name and rules only and have no schedule."""
        self._check_linked()
        own = self.model_copy(update={"schedule": ()})
        schedule = sorted(self.schedule or (Phase(from_step=0),), key=lambda phase: phase.from_step)
        return [(phase.from_step, _with_rules(own, phase.policy) if phase.policy else own) for phase in schedule]

    @property
    def hash(self) -> str:
        """sha256 of the policy as canonical JSON (every default written, keys sorted)."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The policy as a file that loads to an equal one; shorthands where they say everything."""
        values: dict[str, Any] = {"version": self.version, "name": self.name}
        for key in ("source", "extends"):
            if getattr(self, key):
                values[key] = _yaml_list(getattr(self, key))
        if self.rules:
            values["rules"] = [rule.plain() for rule in self.rules]
        for section in ("update", "loss_scale", "wire"):
            if getattr(self, section) != type(self).model_fields[section].default:
                values[section] = _Inline(getattr(self, section).model_dump(mode="json"))
        if self.schedule:
            values["schedule"] = [_plain_phase(phase) for phase in self.schedule]
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=1_000_000)

    def describe(self) -> str:
        """The policy in words and lines, for a person."""
        lines = [f"{self.name}" + (f" ({self.source})" if self.source else ""), f"  hash {self.hash[:16]}"]
        for index, rule in enumerate(self.rules):
            lines += _describe_rule(index, rule)
        if not self.rules:
            lines.append("  no rules: every op is left alone")
        if self.extends:
            lines.append(f"  extends {', '.join(self.extends)} (not loaded)")
        lines.append(f"  update: master {self.update.master}, momentum {self.update.momentum}, {self.update.rounding}")
        lines.append(f"  loss scale: {_describe_loss_scale(self.loss_scale)}")
        wire = self.wire
        lines.append(f"  wire: {wire.format}, one scale per {wire.block} elements" if wire else "  wire: uncompressed")
        for phase in self.schedule:
            lines.append(f"  from step {phase.from_step}: {phase.policy.name if phase.policy else self.name}")
        return "\n".join(lines)

    def _check_linked(self) -> None:
        """Names of other policies are followed by load_policy, which knows where files are."""
        names = [
            *self.extends,
            *(phase.policy.name for phase in self.schedule if phase.policy and phase.policy.rules is None),
        ]
        if names:
            raise PolicyError(
                f'policy "{self.name}" names {", ".join(names)}, not loaded yet', hint="load_policy(policy)"
            )


def key_path(path: Sequence[str | int]) -> str:
    """`("rules", 1, "fwd", "x")` as `rules[1].fwd.x`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _path_in(raw: Any, fault: ErrorDetails) -> tuple[str | int, ...]:
    """The part of a fault's place that the user wrote: below a shorthand there is nothing to point at."""
    path: list[str | int] = []
    for part in (*fault["loc"], *filter(None, (fault.get("ctx", {}).get("key"),))):
        if isinstance(raw, str) or not isinstance(raw, Mapping | Sequence):
            break
        try:
            raw = raw[part]
        except (KeyError, IndexError):
            break
        path.append(part)
    return tuple(path)


def _as_error(fault: ErrorDetails, where: str) -> LpError:
    """Our own faults carry their sentence; pydantic's own are put into the same parts."""
    context = fault.get("ctx", {})
    if fault["type"] in ("policy", "not_supported"):
        kind = PolicyError if fault["type"] == "policy" else NotSupported
        parts = {key: context[key] for key in ("expected", "got", "hint")}
        return kind(context["what"], where=where, **parts)
    if fault["type"] == "missing":
        return PolicyError(f'the key "{fault["loc"][-1]}" is missing', where=where)
    expected = fault["msg"].removeprefix("Input should be ").replace("valid tuple", "list")
    return PolicyError("not a value this key takes", where=where, expected=expected, got=_text(fault["input"]))


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _text(value: Any) -> str:
    """A value as a policy file writes it."""
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)


def _with_rules(policy: Policy, other: PhasePolicy) -> Policy:
    return policy.model_copy(update={"name": other.name, "rules": other.rules})


def _describe_rule(index: int, rule: Rule) -> list[str]:
    lines = [f"  rules[{index}]: {rule.match}"]
    for role in ROLES:
        if gemm := rule.role(role):
            operands = ", ".join(f"{key} {getattr(gemm, key).spec()}" for key in (gemm.LHS, gemm.RHS))
            lines.append(f"    {role:<4} {operands}, accumulate {gemm.accumulate}, out {gemm.out}")
    return lines


def _describe_loss_scale(scale: LossScale) -> str:
    if scale.kind == "none":
        return "none"
    if scale.kind == "static":
        return f"static, {scale.init:g}"
    return (
        f"dynamic, from {scale.init:g}, times {scale.growth:g} after {scale.interval} good steps, "
        f"times {scale.backoff:g} on overflow, at least {scale.min:g}"
    )


def _table(table: dict[str, Any]) -> dict[str, Any]:
    """On one line if every operand is a bare name, else a line per operand."""
    if not any(isinstance(value, dict) for value in table.values()):
        return _Inline(table)
    return {key: _Inline(value) if isinstance(value, dict) else value for key, value in table.items()}


class _Inline(dict[str, Any]):
    """A mapping printed on one line."""


class _Dumper(yaml.SafeDumper):
    """Plain YAML, with _Inline mappings on one line and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Inline, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=True)
)


def _yaml_list(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _plain_phase(phase: Phase) -> dict[str, Any]:
    values: dict[str, Any] = {"from_step": phase.from_step}
    if phase.policy is None:
        return values
    if phase.policy.rules is None:
        return values | {"policy": phase.policy.name}
    return values | {"policy": {"name": phase.policy.name, "rules": [rule.plain() for rule in phase.policy.rules]}}
