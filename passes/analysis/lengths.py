"""Lengths: how many products each of the three sums of a GEMM site adds up, from the shapes in its graph.

    linear   FWD K    BWD N    GRAD M, the rows of every sample of the batch
    matmul   FWD K    BWD N    GRAD M, of every matrix that is multiplied with the same one
    conv     FWD I / groups times the window, BWD O / groups times the window, GRAD batch times positions

With a stride, BWD (FWD of a transposed convolution) is an upper bound. GRAD is that of the first recorded call; a sum
that was empty there says nothing of other calls.
"""

import math
from collections.abc import Sequence

from torch import fx

from passes.ir.gemm_nodes import Composite, GemmNode, argument, read_gemm
from passes.ir.program import REPEATED, SITE, Program
from passes.ir.types import META
from runtime.numerics.specs import ROLES, Role
from runtime.ops.contractions import ConvGeometry

Lengths = dict[Role, int]


def sum_lengths(program: Program) -> dict[str, Lengths]:
    """Site -> role -> products in the sum, the most of all graphs with the site; what no shape says is not in it."""
    found: dict[str, Lengths] = {}
    for _, graph in program.graphs():
        for node in graph.nodes:
            if SITE in node.meta:
                for part, lengths in _lengths_of(node).items():
                    known = found.setdefault(node.meta[SITE] + part, {})
                    for role in ROLES:
                        if lengths.get(role) and not (role == "grad" and node.meta.get(REPEATED)):
                            known[role] = max(lengths[role], known.get(role, 0))
    return found


def _lengths_of(node: fx.Node) -> dict[str, Lengths]:
    """By the part of the site: an attention holds two products."""
    gemm = read_gemm(node)
    if isinstance(gemm, GemmNode):
        return {"": lengths_of(gemm.kind, _shape(gemm.lhs), _shape(gemm.rhs), gemm.geometry)}
    if isinstance(gemm, Composite) and gemm.stem == "sdpa":
        q, k, v = (_shape(argument(node, i, name)) for i, name in enumerate(("query", "key", "value")))
        if q and k and v:
            rows, columns = q[-2], k[-2]
            return {
                ".qk": {"fwd": q[-1], "bwd": columns, "grad": rows},
                ".pv": {"fwd": columns, "bwd": v[-1], "grad": rows},
            }
    return {}


def lengths_of(kind: str, lhs: Sequence[int], rhs: Sequence[int], geometry: ConvGeometry | None = None) -> Lengths:
    """Of one product, from the shapes of its operands; an empty one is not known."""
    return _conv(lhs, rhs, geometry) if geometry else _matrices(lhs, rhs, kind)


def _matrices(lhs: Sequence[int], rhs: Sequence[int], kind: str) -> Lengths:
    lengths: Lengths = {}
    if rhs:
        k, n = rhs[-2:] if kind != "linear" else rhs[::-1]
        lengths = {"fwd": k, "bwd": n}
    if lhs:
        lengths["fwd"] = lhs[-1]
        is_one_matrix = kind != "matmul" or len(rhs) == 2
        lengths["grad"] = math.prod(lhs[:-1]) if is_one_matrix else lhs[-2]
    return lengths


def _conv(lhs: Sequence[int], rhs: Sequence[int], geometry: ConvGeometry) -> Lengths:
    if not rhs:
        return {}
    first, second, *window = rhs
    taps = math.prod(window)
    if geometry.is_transposed:  # rhs is (I, O / groups, window)
        lengths: Lengths = {"fwd": first // geometry.groups * taps, "bwd": second * taps}
    else:
        lengths = {"fwd": second * taps, "bwd": first // geometry.groups * taps}
    if lhs:
        sizes, batch = lhs[-len(window) :], math.prod(lhs[: -len(window) - 1])
        rows = zip(sizes, window, geometry.stride, geometry.padding, geometry.dilation)
        outputs = [(size + 2 * pad - step * (taps - 1) - 1) // stride + 1 for size, taps, stride, pad, step in rows]
        lengths["grad"] = batch * math.prod(sizes if geometry.is_transposed else outputs)
    return lengths


def _shape(node: object) -> Sequence[int]:
    """Empty where it is not known."""
    meta = node.meta.get(META) if isinstance(node, fx.Node) else None
    return tuple(meta.shape) if meta is not None else ()
