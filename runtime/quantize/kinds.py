"""Kinds: the quantizers with state, one a file of learned/ or observed/, by the names that a spec gives them."""

import pkgutil
from importlib import import_module

from runtime.numerics.specs import QuantSpec
from runtime.quantize import learned, observed
from runtime.quantize.learned.quantizer import Learned
from runtime.quantize.observed.quantizer import Observed
from runtime.quantize.stateful import Stateful


def make_quantizer(spec: QuantSpec, owner: str, is_weight: bool) -> Stateful:
    """A new quantizer of the kind that the spec names, for the operand that `owner` names."""
    assert spec.quantizer is not None
    kinds = {each.kind: each for each in (*Learned.__subclasses__(), *Observed.__subclasses__())}
    return kinds[spec.quantizer.kind](spec, owner, is_weight)


for _package in (learned, observed):
    for _module in pkgutil.iter_modules(_package.__path__):
        import_module(f"{_package.__name__}.{_module.name}")
