"""Stored specs: what a policy says of a site, for the operands as they lie in memory.

w: row     one scale per output feature: a row of w_NK, a column of the w_KN that transformers' Conv1D holds
w: channel the same of a linear layer, a column of b in a product a.b; of a convolution its weight's first dim
mxfp8      blocks along the sum: along the row of an operand whose free axis is the row, else down its column; a
           transform turns along the sum likewise. Blocks that are tiles lie along none
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from runtime.numerics.block_formats import get_block_format
from runtime.numerics.free_axes import Side
from runtime.numerics.specs import ROLES, Along, GemmSpec, Granularity, LayerSpec, QuantSpec, Role
from runtime.ops.contractions import ConvGeometry
from runtime.ops.plan import contraction_of


def without(spec: LayerSpec, roles: Iterable[Role]) -> LayerSpec:
    """The spec with these roles as the uncompiled model has them."""
    return spec.having(dict.fromkeys(roles, GemmSpec()))


@lru_cache(maxsize=4096)
def spec_as_stored(kind: str, geometry: ConvGeometry | None, spec: LayerSpec) -> LayerSpec:
    """Of a GEMM of this kind and geometry, as lp.gemm has them."""
    if kind != "conv":
        free: Granularity = "column" if kind == "matmul" else "row"
        fwd, bwd = (replace(numbers, rhs=_per_output(numbers.rhs, free)) for numbers in (spec.fwd, spec.bwd))
        spec = replace(spec, fwd=fwd, bwd=bwd)
    if kind == "linear_kn":
        fwd, bwd = (replace(numbers, rhs=_transposed(numbers.rhs)) for numbers in (spec.fwd, spec.bwd))
        spec = replace(spec, fwd=fwd, bwd=bwd)
    return spec.having({role: _with_blocks_along_sum(kind, geometry, role, spec.role(role)) for role in ROLES})


def _with_blocks_along_sum(kind: str, geometry: ConvGeometry | None, role: Role, numbers: GemmSpec) -> GemmSpec:
    """A scale per row leaves the sum exactly where the sum runs along the row; likewise a column."""
    free = contraction_of(kind, geometry).free_axis
    down: Along = "batched-column" if kind == "matmul" else "column"

    def laid(side: Side, operand: QuantSpec) -> QuantSpec:
        if operand.transform is None and not (operand.is_block and not get_block_format(operand.format).is_square):
            return operand
        return replace(operand, along=down if free[role, side] == "column" else "row")

    return replace(numbers, lhs=laid("lhs", numbers.lhs), rhs=laid("rhs", numbers.rhs))


def _per_output(spec: QuantSpec, free: Granularity) -> QuantSpec:
    if spec.scale is None or spec.scale.granularity != "channel":
        return spec
    return replace(spec, scale=replace(spec.scale, granularity=free))


def _transposed(spec: QuantSpec) -> QuantSpec:
    if spec.scale is None:
        return spec
    other: dict[Granularity, Granularity] = {"row": "column", "column": "row"}
    granularity = other.get(spec.scale.granularity, spec.scale.granularity)
    block = spec.scale.block[::-1] if granularity == "block" else spec.scale.block
    return replace(spec, scale=replace(spec.scale, granularity=granularity, block=block))
