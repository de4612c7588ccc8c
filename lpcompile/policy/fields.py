"""Fields: the values of a policy file, checked as they are read; what is wrong becomes a sentence with its key."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from lpcompile.errors import FormatError, LpError, NotSupported, PolicyError, did_you_mean, nearest_names
from lpcompile.policy.names import (
    OPERAND_NAMES,
    ROLE_NAMES,
    ambiguity,
    as_parts,
    format_of,
    key_of,
    meaning,
    nearest_format,
    word_of,
)
from runtime.numerics.block_formats import (
    BLOCK_FORMATS,
    get_block_format,
    is_block_format,
)
from runtime.numerics.formats import FORMATS, get_format
from runtime.numerics.range_formats import get_range_format, is_range_format
from runtime.numerics.specs import (
    AUTO,
    MAX_SIZE,
)
from runtime.optim.block_names import TABLES, block_state_of
from runtime.optim.split_master import SPLIT


def refusal(what: str, *, expected: str = "", got: str = "", hint: str = "", key: str = "") -> PydanticCustomError:
    """A PolicyError in the making: pydantic adds the key path, Policy the file and line."""
    parts = {"what": what, "expected": expected, "got": got, "hint": hint, "key": key}
    return PydanticCustomError("policy", "{what}", parts)


def as_refusal(error: LpError) -> PydanticCustomError:
    """What the ground says of a value, as a refusal."""
    return refusal(error.what, expected=error.expected, got=error.got, hint=error.hint)


def not_built(what: str, hint: str, key: str = "") -> PydanticCustomError:
    """A NotSupported in the making."""
    parts = {"what": what, "expected": "", "got": "", "hint": hint, "key": key}
    return PydanticCustomError("not_supported", "{what}", parts)


def _check_format(given: str) -> str:
    name = _read_format(given)
    try:
        get_format(name)
    except NotSupported as error:
        raise not_built(error.what, error.hint) from None
    except FormatError as error:
        is_unknown = error.what.endswith("is not a number format")
        hint = nearest_format(given) if is_unknown else error.hint
        what = did_you_mean(error.what, hint) if hint else error.what
        more = as_parts(given) if is_unknown else ""
        raise refusal(what, expected=error.expected, got=error.got, hint=more) from None
    return name


def _read_format(given: str) -> str:
    """The row that a spelling means; a refusal where it means several."""
    if len(given) > 100:
        raise refusal("not a number format", got=f"a name of {len(given)} characters")
    if given not in BLOCK_FORMATS and (meanings := ambiguity(given)):
        raise refusal(f'"{given}" is not the name of one format', hint=meanings)
    return format_of(given)


def one_of(kind: str, known: tuple[str, ...], planned: tuple[str, ...] = ()) -> BeforeValidator:
    """A check that a word is one of `known`; one of `planned` is NotSupported."""

    def check(given: Any) -> Any:
        value = word_of(kind, given) if isinstance(given, str) else given
        if value in planned:
            raise not_built(f'{kind} "{value}" is planned and not in this version', f"one of {', '.join(known)}")
        if value not in known:
            what = f'"{value}" is not a {kind}'
            if meant := meaning(kind, str(value)):
                raise refusal(what, expected=f"one of {', '.join(known)}", got=as_written(given), hint=meant)
            raise refusal(did_you_mean(what, nearest_names(str(value), known)))
        return value

    return BeforeValidator(check)


def words(kind: str, known: tuple[str, ...] = (), may_be_empty: bool = False) -> BeforeValidator:
    """A check and a widening: one word stands for a list of one, each word is one of `known`."""

    def check(value: Any) -> Any:
        words = (value,) if isinstance(value, str) else value
        if (
            not isinstance(words, Sequence)
            or not (words or may_be_empty)
            or not all(isinstance(word, str) for word in words)
        ):
            raise refusal(f"not {_a(kind)} or a list of them", got=as_written(value))
        if known:
            words = [word_of(kind, word) for word in words]
        for word in words:
            if known and word not in known:
                raise refusal(did_you_mean(f'"{word}" is not {_a(kind)}', nearest_names(word, known)))
        return tuple(words)

    return BeforeValidator(check)


def words_schema(known: tuple[str, ...] = ()) -> WithJsonSchema:
    word = {"type": "string", "enum": list(known)} if known else {"type": "string"}
    return WithJsonSchema({"anyOf": [word, {"type": "array", "items": word, "minItems": 1}]})


def _check_operand_format(given: str) -> str:
    name = _read_format(given)
    if not is_block_format(name) and not is_range_format(name):
        return _check_format(given)
    try:
        get_range_format(name) if is_range_format(name) else get_block_format(name)
    except FormatError as error:
        raise as_refusal(error) from None
    return name


def _joined_block(given: Any) -> Any:
    """{format: e4m3, block: 128, expand: true} as e4m3/128/expand."""
    if not isinstance(given, dict):
        return given
    known = ("format", "block", "expand")
    for key in given:
        if key not in known:
            hint = nearest_names(str(key), known)
            raise refusal(did_you_mean(f'"{key}" is no key of a moment', hint), key=str(key))
    if not isinstance(given.get("format"), str):
        raise refusal("a moment has no format", hint="{format: e4m3, block: 128}")
    block, expand = given.get("block"), given.get("expand", False)
    if not isinstance(expand, bool) or (expand and block is None):
        raise refusal("expand is true or false, and needs a block", hint="{format: e4m3, block: 128, expand: true}")
    return given["format"] + ("" if block is None else f"/{block}") + ("/expand" if expand else "")


def _check_moment(given: str) -> str:
    element, slash, rest = given.partition("/")
    if not slash:
        return _check_format(given)
    name = (element.lower() if element.lower() in TABLES else _check_format(element)) + slash + rest.lower()
    try:
        block_state_of(name)
    except NotSupported as error:
        raise as_refusal(error) from None
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
    AfterValidator(lambda name: AUTO if name.lower() == AUTO else _check_format(name)),
    WithJsonSchema({"type": "string", "examples": [AUTO, *FORMATS]}),
]
MasterName = Annotated[
    str,
    AfterValidator(lambda name: SPLIT if name.lower() == SPLIT else _check_format(name)),
    WithJsonSchema({"type": "string", "examples": [SPLIT, *FORMATS]}),
]
MomentName = Annotated[
    str,
    BeforeValidator(_joined_block),
    AfterValidator(_check_moment),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "examples": [*FORMATS, "e4m3/128", "e4m3/128/expand", "dynamic8/256"]},
                {
                    "type": "object",
                    "properties": {
                        "format": {"type": "string"},
                        "block": {"type": "integer", "minimum": 2},
                        "expand": {"type": "boolean"},
                    },
                    "required": ["format"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
Count = Annotated[int, Field(strict=True, gt=0, le=MAX_SIZE)]
Flag = Annotated[bool, Field(strict=True)]


class Section(BaseModel):
    """A mapping of the policy file: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    TWINS: ClassVar[dict[str, str]] = {}
    """Second names of keys: {"a": "x"} reads `a` as `x`."""

    SPELLINGS: ClassVar[Mapping[str, str]] = {}
    """Keys as other systems write them."""

    SHORTHAND: ClassVar[str] = ""
    """The key that a section which is text stands for; "" where it may not be text."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ()
    """Such texts."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if cls.SHORTHAND and isinstance(value, str):
            return {cls.SHORTHAND: value}
        if not isinstance(value, Mapping):
            raise refusal("not a mapping", expected=f"the keys {', '.join(cls.keys())}", got=as_written(value))
        known = (*cls.keys(), *(twin for twin, key in cls.TWINS.items() if key in cls.model_fields))
        read: dict[str, Any] = {}
        names: dict[str, str] = {}
        for given, item in value.items():
            key = key_of(str(given), cls.SPELLINGS, known)
            if key not in known:
                hint = cls._hint_for(str(given)) or nearest_names(str(given)[:100], known)
                raise refusal(did_you_mean(f'"{str(given)[:100]}" is not a key here', hint), key=str(given))
            meant = cls.TWINS.get(key, key)
            if meant in names:
                what = f'"{given}" and "{names[meant]}" name the same {cls.NOUN}'
                raise refusal(what, hint="one of them", key=str(given))
            read[key], names[meant] = item, str(given)
        return read

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """A section with a shorthand may also be that."""
        schema = handler(core_schema)
        if cls.SHORTHAND:
            resolved = handler.resolve_ref_schema(schema)
            section = dict(resolved)
            text = {"type": "string", **({"examples": list(cls.EXAMPLES)} if cls.EXAMPLES else {})}
            resolved.clear()
            resolved.update({"description": section.pop("description", ""), "anyOf": [text, section]})
        return schema

    NOUN: ClassVar[str] = "key"
    """What a key of the section is called."""

    @classmethod
    def keys(cls) -> list[str]:
        """The keys of the section, as a file writes them."""
        return [info.alias or name for name, info in cls.model_fields.items()]

    @classmethod
    def _hint_for(cls, key: str) -> str:
        """What to say about an unknown key that people write on purpose."""
        return ""


def key_path(path: Sequence[str | int]) -> str:
    """`("rules", 1, "fwd", "x")` as `rules[1].fwd.x`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def path_in(raw: Any, fault: ErrorDetails) -> tuple[str | int, ...]:
    """The part of a fault's place that the user wrote: below a shorthand there is nothing to point at."""
    path: list[str | int] = []
    for part in (*fault["loc"], *filter(None, (fault.get("ctx", {}).get("key"),))):
        if isinstance(raw, str) or not isinstance(raw, Mapping | Sequence):
            break
        if isinstance(raw, Mapping) and part not in raw:
            part = next((key for key in raw if isinstance(key, str) and _is_spelling(key, str(part))), part)
        try:
            raw = raw[part]
        except (KeyError, IndexError):
            break
        path.append(part)
    return tuple(path)


def _is_spelling(key: str, of: str) -> bool:
    return any(key_of(key, spellings, (of,)) == of for spellings in (ROLE_NAMES, OPERAND_NAMES))


def as_error(fault: ErrorDetails, where: str) -> LpError:
    """Our own faults carry their sentence; pydantic's own are put into the same parts."""
    context = fault.get("ctx", {})
    if fault["type"] in ("policy", "not_supported"):
        kind = PolicyError if fault["type"] == "policy" else NotSupported
        parts = {key: context[key] for key in ("expected", "got", "hint")}
        return kind(context["what"], where=where, **parts)
    if fault["type"] == "missing":
        return PolicyError(f'the key "{fault["loc"][-1]}" is missing', where=where)
    expected = fault["msg"].removeprefix("Input should be ").replace("valid tuple", "list")
    return PolicyError("not a value this key takes", where=where, expected=expected, got=as_written(fault["input"]))


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def as_written(value: Any) -> str:
    """A value as a policy file writes it; of a long one the beginning."""
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
