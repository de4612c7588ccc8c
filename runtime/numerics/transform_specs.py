"""What turns an operand before it is cast, as specs say it: `hadamard16`, `hadamard128[random]`, `hadamard16[bf16]`."""

from dataclasses import dataclass
from typing import Literal, get_args

from runtime.errors import FormatError
from runtime.numerics.quantizer_specs import check_name

TransformKind = Literal["hadamard16", "hadamard32", "hadamard64", "hadamard128"]
Signs = Literal["fixed", "random"]
TransformRounding = Literal["fp32", "bf16"]

TRANSFORM_KINDS: tuple[TransformKind, ...] = get_args(TransformKind)
SIGNS: tuple[Signs, ...] = get_args(Signs)
TRANSFORM_ROUNDINGS: tuple[TransformRounding, ...] = get_args(TransformRounding)


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
        check_name("transform", self.kind, TRANSFORM_KINDS)
        check_name("rule of signs", self.signs, SIGNS)
        check_name("rounding of a transform", self.round, TRANSFORM_ROUNDINGS)

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
