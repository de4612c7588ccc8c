"""Policy: which number format, scale, rounding and accumulator each GEMM of a model computes in.

    Policy = rules in order + what is not per GEMM (update, loss scale, wire, schedule)
    policy.resolve(sites)  ->  one LayerSpec per site, or None where it is left alone (resolution.py)

A product of two activations y = a.b has the slots of a layer under other names: a is x, b is w. Either spelling is
read, x and w are kept, and a rule for `matmul` alone prints a and b.

Invariants: `load_policy(file with policy.to_yaml()) == policy`; equal policies have equal `hash`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lpcompile.errors import PolicyError, WireError, nearest_names
from lpcompile.policy.fields import (
    Count,
    Flag,
    FormatName,
    MasterName,
    MomentName,
    Section,
    as_error,
    as_written,
    key_path,
    not_built,
    one_of,
    path_in,
    refusal,
    words,
    words_schema,
)
from lpcompile.policy.resolution import Resolution, resolve
from lpcompile.policy.rules import Rule, Site
from lpcompile.policy.schedule import Evaluate, Phase, PhasePolicy, check_schedule
from lpcompile.policy.yaml_text import Inline, dump
from runtime.collectives.wire_format import check_wire_format
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from runtime.numerics.specs import KEEPS, ROLES, ROUNDINGS, Keep, Rounding
from runtime.optim.block_names import block_state_of
from runtime.optim.split_master import SPLIT

if TYPE_CHECKING:
    from runtime.collectives.codec import WireSpec
    from runtime.optim.formats import UpdateFormats


class Update(Section):
    """The weight update."""

    master: MasterName = "fp32"
    """Format of the master weights: a float format, or bf16+16, a bf16 weight and the 16 bits that make it an fp32."""
    momentum: MomentName = "fp32"
    """Format of the first moment: a float format, or one with blocks, as e4m3/128 or {format: e4m3, block: 128}."""
    variance: MomentName = "fp32"
    """Format of the second moment, likewise; SGD has none."""
    rounding: Annotated[Rounding, one_of("rounding", ROUNDINGS)] = "nearest_even"
    """Rounding of what is kept in another format than fp32."""

    @field_validator("master", "momentum", "variance")
    @classmethod
    def _check_float(cls, value: str, info: ValidationInfo) -> str:
        if value != SPLIT and not block_state_of(value) and not isinstance(get_format(value), FloatFormat):
            raise not_built(
                f"{info.field_name} {value} is no float format, and others hold no weights in this version",
                f"{info.field_name}: bf16, dlfloat16, e4m3 or fp32",
            )
        return value

    def formats(self) -> "UpdateFormats":
        """What the optimizers take."""
        from runtime.optim.formats import UpdateFormats  # here: it needs torch, and reading a policy does not

        return UpdateFormats(self.master, self.momentum, self.variance, self.rounding)

    def __str__(self) -> str:
        return f"master {self.master}, momentum {self.momentum}, variance {self.variance}, {self.rounding}"


class LossScale(Section):
    """The factor on the loss that lifts gradients into their format's range; they are unscaled before clipping."""

    kind: Annotated[Literal["none", "static", "dynamic"], one_of("loss scale", ("none", "static", "dynamic"))]
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
    """The scale never falls below this; at most `init`."""

    @model_validator(mode="after")
    def _check_numbers(self) -> "LossScale":
        """What runtime/optim/loss_scale.py refuses, with the key."""
        for key in ("init", "growth", "backoff", "min"):
            number = getattr(self, key)
            if math.frexp(number)[0] != 0.5:
                expected = "a power of two, so that scaling loses no bit"
                raise refusal(
                    f"{key} is {number:g}", expected=expected, hint=f"{2.0 ** round(math.log2(number)):g}", key=key
                )
        if self.kind == "dynamic" and self.min > self.init:
            raise refusal(f"min is {self.min:g}", expected=f"at most init, which is {self.init:g}", key="min")
        return self


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

    def spec(self) -> "WireSpec | None":
        """What engines attach; None: gradients travel as they are."""
        from runtime.collectives.codec import WireSpec  # here: it needs torch, and reading a policy does not

        return None if self.format == "fp32" else WireSpec(self.format, self.block, self.min_numel)

    @model_validator(mode="after")
    def _check_format(self) -> "Wire":
        try:
            if self.format != "fp32":
                check_wire_format(self.format, self.block)
        except WireError as error:
            raise refusal(error.what, expected=error.expected, got=error.got, key="format") from None
        return self

    @field_validator("hierarchical", mode="before")
    @classmethod
    def _check_hierarchical(cls, value: Any) -> Any:
        if value is True:
            raise not_built("hierarchical: true is not in this version", "hierarchical: auto or false")
        if value is not False and value != "auto":
            raise refusal(f"{as_written(value)} is not a value of hierarchical", expected="auto, true or false")
        return value

    @field_validator("error_feedback")
    @classmethod
    def _check_error_feedback(cls, value: bool) -> bool:
        if value:
            raise not_built("error_feedback: true is not in this version", "error_feedback: false")
        return value


class Policy(Section):
    """Which number format, scale, rounding and accumulator each GEMM of a model computes in."""

    @classmethod
    def _hint_for(cls, key: str) -> str:
        hint = nearest_names(key[:100], tuple(cls.keys()))
        return hint if hint.startswith('"') else f"{hint}; and x-{key[:100]}, which is not read and may hold anchors"

    version: Literal[1] = 1
    """Version of the policy language."""
    name: str = "policy"
    """What reports call the policy. Default in a file: the file's name."""
    source: str = ""
    """Where the recipe comes from."""
    extends: Annotated[tuple[str, ...], words("policy name", may_be_empty=True), words_schema()] = ()
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
    evaluate: Evaluate | None = None
    """What modules in evaluation mode compute in. Default: what the step does."""
    keep: Annotated[Keep, one_of("way to keep operands", KEEPS)] = "grid"
    """What forward keeps of a cast operand for backward: the grid values that are multiplied, mostly bf16, or their
    codes, which take the format's own bits. No result changes."""
    elementwise: Any = None
    """Format of everything that is not a GEMM. Not built in this version: refused."""
    calibrate: Any = None
    """How static scales are found. Not built in this version: refused."""
    kv_cache: Any = None
    """Format of the attention cache. Not built in this version: refused."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        """Reports, tables and folders are called by it."""
        if not 0 < len(value) <= 100 or not value.isprintable() or set(value) & set("/\\"):
            expected = "1 to 100 printable characters without / and \\"
            raise refusal(f"{value[:100]!a} is not a name", expected=expected)
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _say_where(cls, value: Any, handler: ModelWrapValidatorHandler["Policy"], info: ValidationInfo) -> "Policy":
        """Turn pydantic's list of errors into the first one, as a sentence with its place."""
        try:
            return handler(value)
        except ValidationError as error:
            locate: Callable[[tuple[str | int, ...]], tuple[str, int]]
            locate = (info.context or {}).get("locate", lambda path: ("policy", 0))
            faults = [(path_in(value, fault), fault) for fault in error.errors()]
            path, fault = min(faults, key=lambda item: locate(item[0])[1])
            raise as_error(fault, ": ".join(filter(None, (locate(path)[0], key_path(path))))) from None

    @field_validator("version", mode="before")
    @classmethod
    def _check_version(cls, value: Any) -> Any:
        if value in ("1", "1.0"):
            raise refusal("version is a number", expected="1, without quotes", got=as_written(value))
        if value != 1 or isinstance(value, bool):
            raise refusal(f"version {str(value)[:100]} is not one this program reads", expected="1")
        return value

    @field_validator("elementwise", "calibrate", "kv_cache")
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> None:
        if value is not None:
            raise not_built(
                f"{info.field_name} is not in this version", "rules for GEMMs, loss_scale, wire and schedule"
            )

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, value: tuple[Phase, ...]) -> tuple[Phase, ...]:
        check_schedule(value)
        return value

    def resolve(self, sites: Sequence[Site]) -> Resolution:
        """The LayerSpec of each site under `rules`; of a phase, ask the policy of that phase."""
        self._check_linked()
        return resolve(self.rules, sites, self.keep)

    def over(self, steps: int) -> "Policy":
        """Of a run of so many optimizer steps: what its schedule says in shares of the run is said in steps."""
        return self.model_copy(update={"schedule": tuple(phase.over(steps) for phase in self.schedule)})

    @property
    def phases(self) -> list[tuple[int, "Policy"]]:
        """(first step, policy), sorted by step. The policies differ in name and rules only and have no schedule. Raises
        PolicyError for shares of a run whose length is not known.
        """
        self._check_linked()
        phases: list[tuple[int, Policy]] = []
        for phase in self.schedule or (Phase(from_step=0),):
            if isinstance(phase.from_step, str):
                raise PolicyError(
                    "a share of a run, and how many steps that has is not known",
                    where=f'policy "{self.name}", from_step: {phase.from_step}',
                    hint="lpcompile(model, load_policy(policy).over(steps))",
                )
            phases.append((phase.from_step, phase.of(self)))
        return sorted(phases, key=lambda phase: phase[0])

    @property
    def evaluation(self) -> "Policy | None":
        """The policy of modules in evaluation mode; None: that of the step."""
        self._check_linked()
        return None if self.evaluate is None else Phase(from_step=0, policy=self.evaluate.policy).of(self)

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
                values[section] = Inline(getattr(self, section).model_dump(mode="json"))
        if self.keep != "grid":
            values["keep"] = self.keep
        if self.schedule:
            values["schedule"] = [phase.plain() for phase in self.schedule]
        if self.evaluate:
            values["evaluate"] = {"policy": self.evaluate.policy.plain()}
        return dump(values)

    def describe(self) -> str:
        """The policy in words and lines, for a person."""
        lines = [f"{self.name}" + (f" ({self.source})" if self.source else ""), f"  hash {self.hash[:16]}"]
        for index, rule in enumerate(self.rules):
            lines += _describe_rule(index, rule)
        if not self.rules:
            lines.append("  no rules: every op is left alone")
        if self.extends:
            lines.append(f"  extends {', '.join(self.extends)} (not loaded)")
        if self.keep != "grid":
            lines.append(f"  forward keeps the {self.keep} of what backward reads")
        lines.append(f"  update: {self.update}")
        lines.append(f"  loss scale: {_describe_loss_scale(self.loss_scale)}")
        wire = self.wire
        lines.append(f"  wire: {wire.format}, one scale per {wire.block} elements" if wire else "  wire: uncompressed")
        for phase in self.schedule:
            lines.append(f"  from step {phase.from_step}: {phase}")
        if self.evaluate:
            lines.append(f"  in evaluation mode: {self.evaluate.policy.name}")
        return "\n".join(lines)

    @property
    def named_policies(self) -> list[PhasePolicy]:
        """Those of the schedule and of evaluation."""
        named = [policy for phase in self.schedule for policy in phase.named.values()]
        return [*named, self.evaluate.policy] if self.evaluate else named

    def _check_linked(self) -> None:
        """Names of other policies are followed by load_policy, which knows where files are."""
        names = [
            *self.extends,
            *(policy.name for policy in self.named_policies if policy.rules is None),
        ]
        if names:
            raise PolicyError(
                f'policy "{self.name}" names {", ".join(names)}, not loaded yet', hint="load_policy(policy)"
            )


def _describe_rule(index: int, rule: Rule) -> list[str]:
    left = "" if not rule.leave else ", left alone" if rule.leave == ROLES else f", {', '.join(rule.leave)} left alone"
    lines = [f"  rules[{index}]: {rule.match}{left}"]
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


def _yaml_list(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)
