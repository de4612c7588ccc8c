"""Parts of a cast beside its format and scale: what learns the scale, and what turns the operand before it is cast.

QuantizerSpec    `pact[init=8]` or `lsq`
TransformSpec    `hadamard16`, `hadamard128[random]`, `hadamard16[bf16]`
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from runtime.errors import FormatError, nearest_names

QuantizerKind = Literal["pact", "lsq"]
"""Each a file of runtime/quantize/learned/."""
TransformKind = Literal["hadamard16", "hadamard32", "hadamard64", "hadamard128"]
Signs = Literal["fixed", "random"]
TransformRounding = Literal["fp32", "bf16"]

QUANTIZER_KINDS: tuple[QuantizerKind, ...] = get_args(QuantizerKind)
TRANSFORM_KINDS: tuple[TransformKind, ...] = get_args(TransformKind)
SIGNS: tuple[Signs, ...] = get_args(Signs)
TRANSFORM_ROUNDINGS: tuple[TransformRounding, ...] = get_args(TransformRounding)


def check_word(kind: str, value: str, known: tuple[str, ...]) -> None:
    """FormatError for a word that is none of `known`."""
    if value not in known:
        raise FormatError(f'"{value}" is not a {kind}', hint=nearest_names(value, known))


@dataclass(frozen=True)
class QuantizerSpec:
    """A quantizer with state (runtime/quantize/learned/), one per operand of a site: `pact[init=8]` or `lsq`.

    init: pact's clip, or lsq's step, before anything was learned; None: pact 8, lsq 2 E|x| / sqrt(Qp) of the first x.
    """

    kind: QuantizerKind
    init: float | None = None

    def __post_init__(self) -> None:
        check_word("quantizer", self.kind, QUANTIZER_KINDS)
        if self.init is not None and not 0 < self.init < float("inf"):
            raise FormatError("no value to begin at", expected="init above 0", got=str(self.init))

    def __str__(self) -> str:
        return self.kind if self.init is None else f"{self.kind}[init={self.init!r}]"

    @staticmethod
    def parse(text: str) -> "QuantizerSpec":
        if not (parts := re.fullmatch(r"([a-z]+)(?:\[init=([-+0-9.e]+)\])?", text)):
            raise FormatError(f'"{text}" is not a quantizer', expected="KIND or KIND[init=NUMBER]")
        try:
            return QuantizerSpec(parts[1], float(parts[2]) if parts[2] else None)  # type: ignore[arg-type]
        except ValueError as error:
            raise FormatError(f'"{text}" is not a quantizer', expected="KIND[init=NUMBER]", got=parts[2]) from error


@dataclass(frozen=True)
class TransformSpec:
    """A randomized Hadamard transform of an operand along the sum of its GEMM, before its cast (hadamard.py).

    signs: fixed, one vector for every run, or random, drawn for each call of a GEMM. round: of what the transform
    gives; bf16 as Transformer Engine does before it quantizes to NVFP4.
    """

    kind: TransformKind
    signs: Signs = "fixed"
    round: TransformRounding = "fp32"

    def __post_init__(self) -> None:
        check_word("transform", self.kind, TRANSFORM_KINDS)
        check_word("rule of signs", self.signs, SIGNS)
        check_word("rounding of a transform", self.round, TRANSFORM_ROUNDINGS)

    @property
    def size(self) -> int:
        """Elements that are turned together."""
        return int(self.kind.removeprefix("hadamard"))

    @property
    def is_random(self) -> bool:
        """Whether it draws its signs."""
        return self.signs == "random"

    def __str__(self) -> str:
        more = [word for word, usual in ((self.signs, "fixed"), (self.round, "fp32")) if word != usual]
        return f"{self.kind}[{','.join(more)}]" if more else self.kind

    @staticmethod
    def parse(text: str) -> "TransformSpec":
        kind, bracket, rest = text.partition("[")
        words = rest.removesuffix("]").split(",") if bracket else []
        if bracket and not rest.endswith("]"):
            raise FormatError(f'"{text}" is not a transform', expected="KIND, KIND[random] or KIND[random,bf16]")
        signs = words.pop(0) if words and words[0] in SIGNS else "fixed"
        rounding = words.pop(0) if words else "fp32"
        if words:
            raise FormatError(f'"{text}" is not a transform', expected="KIND, KIND[random] or KIND[random,bf16]")
        return TransformSpec(kind, signs, rounding)  # type: ignore[arg-type]
