"""Cast keys: which cast an lp node is of. Passes share, keep and cancel casts by them, never by what specs print as."""

from torch import fx

from runtime.numerics.specs import LayerSpec, QuantSpec
from runtime.ops.dialect import OPS
from runtime.quantize.qtensor import CastKey

SCALE, QUANTIZE = OPS["lp.scale"].run, OPS["lp.quantize"].run


def cast_key(node: fx.Node) -> CastKey:
    """Of a node of one cast: lp.scale, lp.constant_scale, lp.learned_scale, lp.carrier, lp.quantize, lp.dequantize."""
    return CastKey(cast_spec(node), str(node.kwargs.get("quantizer", "")))


def cast_spec(node: fx.Node) -> QuantSpec:
    """What a node of one cast says of it."""
    return QuantSpec.parse(str(node.kwargs["spec"]))


def gemm_spec(node: fx.Node) -> LayerSpec:
    """What an lp.gemm computes in."""
    return LayerSpec.parse(str(node.kwargs["spec"]))
