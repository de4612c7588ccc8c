"""Schedule: which rules hold from which optimizer step on, for all three GEMMs or for one of them; and in evaluation.

schedule: [{from_step: 0}, {from_step: 80%, fwd: bf16}]    # the last fifth: fwd as bf16 says
evaluate: bf16                                             # what a module in evaluation mode computes in
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from lpcompile.policy.fields import Section, as_written, refusal
from lpcompile.policy.names import ROLE_NAMES
from lpcompile.policy.rules import Rule
from runtime.numerics.specs import MAX_SIZE, ROLES

if TYPE_CHECKING:
    from lpcompile.policy.resolve import Policy


class PhasePolicy(Section):
    """The rules of a phase: a name, and once loaded the rules behind it."""

    SHORTHAND = "name"

    name: str
    """A shipped name, or a path relative to the file."""
    rules: tuple[Rule, ...] | None = None
    """Its rules, filled when the policy is loaded."""

    def plain(self) -> Any:
        """As a policy file writes it."""
        return self.name if self.rules is None else {"name": self.name, "rules": [rule.plain() for rule in self.rules]}


_SHARE = "^[0-9]{1,2}([.][0-9]{1,9})? ?%$"


def _check_step(value: Any) -> int | str:
    if isinstance(value, str) and value.endswith("%"):
        if re.search(_SHARE, value):
            return value.replace(" ", "")
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE:
        return value
    raise refusal("not a step", expected="0, 200, or a share of the run from 0% on, below 100%", got=as_written(value))


class Phase(Section):
    """From which optimizer step on which rules hold. Only rules: update, loss scale and wire stay this policy's."""

    SPELLINGS = ROLE_NAMES

    from_step: Annotated[
        int | str,
        BeforeValidator(_check_step),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "integer", "minimum": 0},
                    {"type": "string", "pattern": "^[0-9]{1,2}([.][0-9]{1,9})? ?%$"},
                ]
            }
        ),
    ]
    """First optimizer step of the phase; "80%": the first that has this share of the run's steps behind it."""
    policy: PhasePolicy | None = None
    """Whose rules hold. Default: its own rules."""
    fwd: PhasePolicy | None = None
    """Whose rules hold for fwd instead."""
    bwd: PhasePolicy | None = None
    """Whose rules hold for bwd instead."""
    grad: PhasePolicy | None = None
    """Whose rules hold for grad instead."""

    @property
    def named(self) -> dict[str, PhasePolicy]:
        """The policies that the phase names, by key."""
        named = {key: getattr(self, key) for key in ("policy", *ROLES)}
        return {key: policy for key, policy in named.items() if policy is not None}

    def over(self, steps: int) -> "Phase":
        """With the step that a share of a run of so many steps means."""
        if isinstance(self.from_step, int):
            return self
        return self.model_copy(update={"from_step": math.ceil(Fraction(self.from_step[:-1]) / 100 * steps)})

    def of(self, own: "Policy") -> "Policy":
        """The policy that holds in this phase: that of the whole, with the rules of the phase."""
        named = self.named
        name, rules = own.name, own.rules
        if base := named.pop("policy", None):
            name, rules = base.name, base.rules or ()
        if named:
            rest = [rule.only([role for role in ROLES if role not in named]) for rule in rules]
            over = [rule.only([role]) for role in ROLES if role in named for rule in named[role].rules or ()]
            rules = tuple(rule for rule in (*over, *rest) if rule is not None)
            name = ", ".join([name, *(f"{role} of {policy.name}" for role, policy in named.items())])
        return own.model_copy(update={"name": name, "rules": rules, "schedule": (), "evaluate": None})

    def link(self, load: Callable[[str, str], tuple[Rule, ...]]) -> "Phase":
        """With the rules of the policies that it names, `load(key, name)`."""
        found = {
            key: PhasePolicy(name=policy.name, rules=load(key, policy.name))
            for key, policy in self.named.items()
            if policy.rules is None
        }
        return self.model_copy(update=found) if found else self

    def plain(self) -> dict[str, Any]:
        """As a policy file writes it."""
        return {"from_step": self.from_step} | {key: policy.plain() for key, policy in self.named.items()}

    def __str__(self) -> str:
        names = [policy.name if key == "policy" else f"{key} of {policy.name}" for key, policy in self.named.items()]
        return ", ".join(names) or "its own rules"


class Evaluate(Section):
    """What modules in evaluation mode compute in."""

    SHORTHAND = "policy"

    policy: PhasePolicy
    """Whose rules hold for a module whose `training` is False, as dropout and batch norm have it."""


def check_schedule(schedule: tuple[Phase, ...]) -> None:
    """One phase holds at step 0, and no two start at one place, as far as steps and shares can be told apart."""
    starts = [Fraction(str(phase.from_step).removesuffix("%")) for phase in schedule]
    if schedule and 0 not in starts:
        first = min(zip(starts, schedule), key=lambda each: each[0])[1].from_step
        raise refusal("no rules hold at step 0", expected="an entry with from_step: 0", got=f"from_step: {first}")
    for phase, start in zip(schedule, starts):
        kind = isinstance(phase.from_step, str) and start > 0
        if [(isinstance(p.from_step, str) and s > 0, s) for p, s in zip(schedule, starts)].count((kind, start)) > 1:
            raise refusal(f"two entries start at step {phase.from_step}", expected="one entry per step")
