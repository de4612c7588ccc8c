"""Quantizer specs: which quantizer with state has the scale of a cast, as frozen values that print and parse.

    pact[init=8.0]   lsq                learned by a gradient (runtime/quantize/learned/)
    delayed          delayed[history=16,algorithm=most_recent,margin=1,per_rank=true]
    grad-scale[rule=exact]              observed: the scale follows from earlier steps (runtime/quantize/observed/)

What is default is not printed. Each says whether it `learns`, which formats and roundings it takes, and of what.
"""

import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from runtime.errors import FormatError, nearest_names

LearnedKind = Literal["pact", "lsq"]
QuantizerKind = Literal[LearnedKind, "grad-scale"]
"""What a policy may name a quantizer; `delayed` is the rule of a scale."""
Algorithm = Literal["max", "most_recent"]
GradScaleRule = Literal["max-align", "exact", "dalle"]

QUANTIZER_KINDS: tuple[QuantizerKind, ...] = get_args(QuantizerKind)
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
GRAD_SCALE_RULES: tuple[GradScaleRule, ...] = get_args(GradScaleRule)
MAX_HISTORY, MAX_MARGIN = 1 << 16, 30


def check_name(kind: str, value: str, known: tuple[str, ...]) -> None:
    """FormatError where `value` is none of `known`."""
    if value not in known:
        raise FormatError(f'"{value}" is not a {kind}', hint=nearest_names(value, known))


@dataclass(frozen=True)
class QuantizerSpec:
    """One that learns by a gradient: of integers, x and w, each with a scale per tensor.

    init: pact's clip, or lsq's step, before anything was learned; None: pact 8, lsq 2 E|x| / sqrt(Qp) of the first x.
    """

    kind: LearnedKind
    init: float | None = None
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_name("quantizer", self.kind, get_args(LearnedKind))
        if self.init is not None and not 0 < self.init < float("inf"):
            raise FormatError("no value to begin at", expected="init above 0", got=str(self.init))

    def __str__(self) -> str:
        return _printed(self.kind, self, ("kind",))

    @staticmethod
    def parse(text: str) -> "AnyQuantizerSpec":
        """One of any kind, as `str` gives it."""
        parts = re.fullmatch(r"([a-z-]+)(?:\[([^\]]*)\])?", text)
        given = [each.partition("=") for each in parts[2].split(",")] if parts and parts[2] is not None else []
        if parts is None or not is_quantizer(text) or not all(mark for _, mark, _ in given):
            raise FormatError(f'"{text}" is not a quantizer', expected="KIND or KIND[NAME=VALUE,...]")
        kind = parts[1]
        make = {"delayed": DelayedSpec, "grad-scale": GradScaleSpec}.get(kind)
        try:
            values = {name: _READ[name](value) for name, _, value in given}
            return make(**values) if make else QuantizerSpec(kind, **values)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f'"{text}" is not a quantizer', expected="KIND[NAME=VALUE]", got=str(parts[2])) from error


@dataclass(frozen=True)
class DelayedSpec:
    """A scale made from the largest magnitudes of the steps before: amax / max(format) 2^margin, of their largest or of
    the last. `history`: how many steps; `per_rank`: each rank by its own, else by the largest of all ranks.
    """

    history: int = 1024
    algorithm: Algorithm = "max"
    margin: int = 0
    per_rank: bool = False
    kind: ClassVar[Literal["delayed"]] = "delayed"
    learns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_name("algorithm of a delayed scale", self.algorithm, ALGORITHMS)
        for name, value, least, most in (
            ("history", self.history, 1, MAX_HISTORY), ("margin", self.margin, 0, MAX_MARGIN)
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise FormatError(f"not a {name} of a delayed scale", expected=f"{least} to {most}", got=str(value))

    def __str__(self) -> str:
        return _printed(self.kind, self)


@dataclass(frozen=True)
class GradScaleSpec:
    """A power of two per layer that keeps gradients in the range of their format, by one of three rules
    (runtime/quantize/observed/grad_scale.py). `per_rank` as of a delayed scale.
    """

    rule: GradScaleRule = "max-align"
    per_rank: bool = False
    kind: ClassVar[Literal["grad-scale"]] = "grad-scale"
    learns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_name("rule of a GradScale", self.rule, GRAD_SCALE_RULES)

    def __str__(self) -> str:
        return _printed(self.kind, self)


ObservedSpec = DelayedSpec | GradScaleSpec
AnyQuantizerSpec = QuantizerSpec | ObservedSpec


def is_quantizer(text: str) -> bool:
    """Whether a word of a cast names a quantizer."""
    return text.partition("[")[0] in (*QUANTIZER_KINDS, "delayed")


def _printed(kind: str, spec: Any, left_out: tuple[str, ...] = ()) -> str:
    said = {
        each.name: getattr(spec, each.name)
        for each in fields(spec)
        if each.name not in left_out and getattr(spec, each.name) != each.default
    }
    words = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in said.items()]
    return f"{kind}[{','.join(words)}]" if words else kind


_READ: dict[str, Any] = {
    "init": float,
    "history": int,
    "algorithm": str,
    "margin": int,
    "rule": str,
    "per_rank": {"true": True, "false": False}.__getitem__,
}
