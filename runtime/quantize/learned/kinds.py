"""Kinds: the quantizers with state, one a file of this folder, by the names that a policy gives them."""

import pkgutil
from importlib import import_module

from runtime.numerics.specs import QuantSpec
from runtime.quantize import learned
from runtime.quantize.learned.quantizer import Learned


def make_quantizer(spec: QuantSpec, owner: str, is_weight: bool) -> Learned:
    """A new quantizer of the kind that the spec names, for the operand that `owner` names."""
    assert spec.quantizer is not None
    kinds = {each.kind: each for each in Learned.__subclasses__()}
    return kinds[spec.quantizer.kind](spec, owner, is_weight)


for _module in pkgutil.iter_modules(learned.__path__):
    if _module.name != "kinds":
        import_module(f"{learned.__name__}.{_module.name}")
