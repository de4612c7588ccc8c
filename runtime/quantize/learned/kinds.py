"""Kinds: the quantizers with state by the names that a policy gives them."""

from runtime.numerics.specs import QuantizerKind, QuantSpec
from runtime.quantize.learned.lsq import Lsq
from runtime.quantize.learned.pact import Pact
from runtime.quantize.learned.quantizer import Learned

KINDS: dict[QuantizerKind, type[Learned]] = {"pact": Pact, "lsq": Lsq}


def make_quantizer(spec: QuantSpec, owner: str, is_weight: bool) -> Learned:
    """A new quantizer of the kind that the spec names, for the operand that `owner` names."""
    assert spec.quantizer is not None
    return KINDS[spec.quantizer.kind](spec, owner, is_weight)
