"""Stateless: the quantizer of a spec that says everything."""

from functools import lru_cache

from runtime.numerics.specs import QuantSpec
from runtime.quantize.block import Block
from runtime.quantize.dynamic import Dynamic
from runtime.quantize.quantizer import AbstractQuantizer


@lru_cache(maxsize=4096)
def quantizer_of(spec: QuantSpec) -> AbstractQuantizer:
    """The one without state that casts as `spec` says."""
    return Block(spec) if spec.is_block else Dynamic(spec)
