"""Rules: which sites of a model a policy speaks of, and what their GEMMs compute in."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from lpcompile.errors import did_you_mean, nearest_names
from lpcompile.policy.fields import Section, as_written, refusal, words, words_schema
from lpcompile.policy.gemms import Bwd, Fwd, Gemm, Grad
from lpcompile.policy.names import ROLE_NAMES, key_of
from lpcompile.policy.patterns import (
    check_bound,
    check_layers,
    check_pattern,
    fulfils,
    layer_of,
    matches_any,
    matches_layers,
)
from lpcompile.policy.yaml_text import Inline, inline_table
from runtime.numerics.specs import (
    ROLES,
    Role,
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
    classes: tuple[str, ...] = ()
    """Class of the module that holds it and its base classes, by name; where known."""
    owner: str | None = None
    """Path of the module that holds it, where known."""
    num_layers: int | None = None
    """How many layers stand beside the one that it is in, itself included, where known."""
    kernel: int | None = None
    """The longest side of a convolution's kernel, where known."""
    groups: int | None = None
    """Groups of a convolution, where known."""

    @property
    def module(self) -> str:
        """Path of the module that holds the product: `mlp.gate` of `mlp.gate.linear_0` and of a leaf its own."""
        if self.owner is not None:
            return self.owner
        return (
            self.name
            if self.index is not None
            else re.sub(r"\.?[a-z0-9]+(_[a-z0-9]+)*_[0-9]+(\.[a-z]+)?$", "", self.name)
        )


@dataclass(frozen=True)
class Origin:
    """Where a rule was written: `policy.yaml:12: rules[1]`. Rules that say the same are equal wherever they stand."""

    text: str = field(default="", compare=False)
    file: str = field(default="", compare=False)
    """The file's name; rules of one file are meant to be read together."""
    is_shipped: bool = field(default=False, compare=False)
    """Whether the file comes with the package: such a rule is for every model, and need not match in each."""


Bound = Annotated[
    str | None,
    BeforeValidator(lambda value: None if value is None else check_bound(value)),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[ 0-9<>=!%,]+$"}]}),
]


class Shape(Section):
    """Bounds on the sizes of FWD, an (m, k) by (k, n) product, and on a convolution's geometry. An unknown size is not
    within any bound.
    """

    n: Bound = None
    """Output features: ">=64", ">=64,<=4096", "%16" (a multiple), "!%16", 64."""
    k: Bound = None
    """Length of the reduction, the same."""
    kernel: Bound = None
    """The longest side of a convolution's kernel: 1 is a convolution of 1 x 1. Of the layers that are convolutions."""
    groups: Bound = None
    """Groups of a convolution: ">1" is a grouped or a depthwise one. Of the layers that are convolutions."""

    @classmethod
    def _hint_for(cls, key: str) -> str:
        return "m is not known when a model is compiled; n and k are" if key == "m" else ""

    def matches(self, site: Site) -> bool:
        bounds = {key: bound for key in self.keys() if (bound := getattr(self, key)) is not None}
        return all(fulfils(getattr(site, key), bound) for key, bound in bounds.items())


def _patterns(value: Any) -> Any:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not patterns or not all(isinstance(each, str) for each in patterns):
        raise refusal("not a name or a list of them", got=as_written(value), hint='a glob such as "*.mlp.*"')
    return tuple(map(check_pattern, patterns))


Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns), words_schema()]


class Match(Section):
    """Which sites a rule is for: all of the conditions hold. No condition: every site."""

    name: Patterns = ("*",)
    """Module paths: a glob on the whole path (`*` also crosses dots), `re:` and a regular expression, or a list of
    these, of which one is enough. A module's pattern is also for the products that the module itself writes."""
    not_: Patterns = Field(default=(), alias="not")
    """Module paths that are not meant, the same way."""
    class_: Patterns = Field(default=(), alias="class")
    """Class of the module that holds the product, or a base class of it, by name, the same way."""
    layers: Annotated[
        str | None,
        BeforeValidator(lambda value: None if value is None else check_layers(value)),
        WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "array", "minItems": 1}]}),
    ] = None
    """Layers by the first number in the module path: "2-13, -2..", counted from 0, or from the end with -1 the last."""
    op: Annotated[tuple[str, ...], words("op", OPS), words_schema(OPS)] = ()
    """One op or a list of them. Default: every op."""
    position: Annotated[tuple[str, ...], words("position", POSITIONS), words_schema(POSITIONS)] = ()
    """first, last or both, by registration order of the GEMM-bearing leaves that the model calls, as far as that is
    known; functional GEMMs are not counted."""
    shape: Shape | None = None
    """Bounds on n and k."""

    @classmethod
    def _hint_for(cls, key: str) -> str:
        others = {"layer": "layers", "exclude": "not", "ignore": "not", "targets": "name", "regex": 'name: "re:..."'}
        others |= {"module": "name", "path": "name", "type": "class", "module_class": "class", "dims": "shape"}
        return f'"{others[key]}"? Known: {", ".join(cls.keys())}' if key in others else ""

    def matches(self, site: Site) -> bool:
        """Whether a rule with these conditions is for a site."""
        paths = (site.name, site.module)
        if not matches_any(self.name, *paths) or matches_any(self.not_, *paths) or (self.op and site.op not in self.op):
            return False
        if self.class_ and not matches_any(self.class_, *site.classes):
            return False
        if self.layers is not None:
            _, layer = layer_of(site.name) or ("", None)
            if not matches_layers(self.layers, layer, site.num_layers):
                return False
        places = {"first": 0, "last": site.count - 1}
        if self.position and site.index not in [places[position] for position in self.position]:
            return False
        return self.shape is None or self.shape.matches(site)

    def may_match(self, site: Site) -> bool:
        """Whether a rule with these conditions is for a site, or may be once its sizes are known."""
        is_open = self.shape is not None and (site.n is None or site.k is None)
        return self.matches(site) or (is_open and self.model_copy(update={"shape": None}).matches(site))

    def plain(self) -> dict[str, Any]:
        """As a policy file writes it."""
        values = self.model_dump(mode="json", exclude_defaults=True, exclude_none=True, by_alias=True)
        return {
            key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in values.items()
        }

    def __str__(self) -> str:
        if not (conditions := self.plain()):
            return "every GEMM"
        words = {key: "|".join(value) if isinstance(value, list) else value for key, value in conditions.items()}
        shape = ", ".join(f"{key} {bound}" for key, bound in conditions.get("shape", {}).items())
        return ", ".join(shape if key == "shape" else f"{key} {value}" for key, value in words.items())


def _roles(value: Any) -> Any:
    if isinstance(value, bool):
        return ROLES if value else ()
    roles = (value,) if isinstance(value, str) else value
    if not isinstance(roles, list | tuple) or not all(isinstance(role, str) for role in roles):
        raise refusal(
            "not what a rule leaves", expected=f"true, or a list of {', '.join(ROLES)}", got=as_written(value)
        )
    read = [key_of(role, ROLE_NAMES, ROLES) for role in roles]
    for given, role in zip(roles, read):
        if role not in ROLES:
            raise refusal(did_you_mean(f'"{given}" is not a role', nearest_names(given[:100], ROLES)))
    return tuple(role for role in ROLES if role in read)


class Rule(Section):
    """What the GEMMs of the sites it matches compute in. A role it does not name is left to the rules below it."""

    SPELLINGS = ROLE_NAMES

    @classmethod
    def _hint_for(cls, key: str) -> str:
        """No role is guessed: another one would load."""
        return "The roles are fwd (fprop, y = x.w), bwd (dgrad, dx = dy.w) and grad (wgrad, dw = dy.x). Known: " + (
            ", ".join(cls.model_fields)
        )

    match: Match = Match()
    """Which sites the rule is for. Default: all."""
    fwd: Fwd | None = None
    """y = x.w"""
    bwd: Bwd | None = None
    """dx = dy.w"""
    grad: Grad | None = None
    """dw = dy.x"""
    leave: Annotated[
        tuple[Role, ...],
        BeforeValidator(_roles),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "boolean"},
                    {"type": "string", "enum": list(ROLES)},
                    {"type": "array", "items": {"type": "string", "enum": list(ROLES)}, "minItems": 1},
                ]
            }
        ),
    ] = ()
    """Roles that the rules above do not decide and that run as in the original model; true: all three."""

    _origin: Origin = PrivateAttr(default=Origin())

    @model_validator(mode="after")
    def _check_roles(self) -> "Rule":
        sets = [role for role in ROLES if self.role(role) is not None]
        if not sets and not self.leave:
            raise refusal("the rule sets no role", expected=f"at least one of {', '.join(ROLES)}, or leave: true")
        if both := [role for role in sets if role in self.leave]:
            raise refusal(
                "the rule leaves alone what it sets", got=f"leave and {both[0]}", hint="one of them", key="leave"
            )
        return self

    def decides(self, role: Role) -> bool:
        """Whether it says something of a role, be it that it is left alone."""
        return role in self.leave or self.role(role) is not None

    def only(self, roles: Sequence[Role]) -> "Rule | None":
        """What it says of these roles; None if nothing."""
        if not any(self.decides(role) for role in roles):
            return None
        others: dict[str, Any] = {role: None for role in ROLES if role not in roles}
        return self.model_copy(update={**others, "leave": tuple(role for role in self.leave if role in roles)})

    def role(self, role: Role) -> Gemm | None:
        return {"fwd": self.fwd, "bwd": self.bwd, "grad": self.grad}[role]

    def plain(self) -> dict[str, Any]:
        """As a policy file writes it."""
        match = self.match.plain()
        tables = {role: gemm.plain(twins=self.match.op == ("matmul",)) for role in ROLES if (gemm := self.role(role))}
        written: dict[str, Any] = {"match": Inline(match)} if match else {}
        if self.leave:
            written["leave"] = True if self.leave == ROLES else list(self.leave)
        return written | {role: inline_table(table) for role, table in tables.items()}
