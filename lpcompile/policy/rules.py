"""Rules: which sites of a model a policy speaks of, and what their GEMMs compute in."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from lpcompile.policy.fields import Section, refusal, words, words_schema
from lpcompile.policy.gemms import Bwd, Fwd, Gemm, Grad
from lpcompile.policy.names import ROLE_NAMES
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


@dataclass(frozen=True)
class Origin:
    """Where a rule was written: `policy.yaml:12: rules[1]`. Rules that say the same are equal wherever they stand."""

    text: str = field(default="", compare=False)


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
    if not sign or not re.fullmatch(r"[0-9]{1,12}", text.removeprefix(sign)):
        expected = f"a size such as 64 or a comparison such as >=64 (one of {' '.join(_COMPARISONS)})"
        raise refusal(f'"{str(value)[:60]}" is not a bound', expected=expected)
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
    op: Annotated[tuple[str, ...], words("op", OPS), words_schema(OPS)] = ()
    """One op or a list of them. Default: every op."""
    position: Annotated[tuple[str, ...], words("position", POSITIONS), words_schema(POSITIONS)] = ()
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

    _origin: Origin = PrivateAttr(default=Origin())

    @model_validator(mode="after")
    def _check_roles(self) -> "Rule":
        if all(self.role(role) is None for role in ROLES):
            raise refusal("the rule sets no role", expected=f"at least one of {', '.join(ROLES)}")
        return self

    def role(self, role: Role) -> Gemm | None:
        return {"fwd": self.fwd, "bwd": self.bwd, "grad": self.grad}[role]

    def plain(self) -> dict[str, Any]:
        """As a policy file writes it."""
        match = self.match.plain()
        tables = {role: gemm.plain(twins=self.match.op == ("matmul",)) for role in ROLES if (gemm := self.role(role))}
        return ({"match": Inline(match)} if match else {}) | {
            role: inline_table(table) for role, table in tables.items()
        }
