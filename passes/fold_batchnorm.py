"""fold-batchnorm: a batch norm in evaluation mode goes into weight and bias of the layer next to it, before they are
cast.

    %c = conv2d(%x, %w, %b)         becomes      %s = lp.norm_scale(%gamma, %var)
    %y = batch_norm(%c, ...)                     %t = lp.norm_shift(%beta, %mean, %s)
                                                 %y = conv2d(%x, lp.fold_weight(%w, %s), lp.fold_bias(%w, %b, %s, %t))

Weights stay in their module, and what is cast is the folded weight. A batch norm before a layer is folded where no
window reaches into a padding.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.analysis.writes import epochs
from passes.finding import Finding
from passes.ir.gemm_nodes import GemmNode, read_gemm
from passes.ir.program import SITE, SPEC, WEIGHT, Program
from passes.ir.types import META
from passes.manager import Pass
from runtime.ops.dialect import OPS


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """For inference. Only next to GEMMs that the policy names and annotate did not refuse; a batch norm that stays
    there is a finding, with the reason.
    """

    name: ClassVar[str] = "fold-batchnorm"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "uncast")

    def run(self, program: Program) -> bool:
        changed = False
        for unit in program.units.values():
            for node in unit.graph.find_nodes(op="call_function", target=torch.batch_norm):
                changed |= _fold(program, unit.graph, node)
        return changed


def _fold(program: Program, graph: fx.Graph, norm: fx.Node) -> bool:
    """Fold a batch norm into the layer before it, else into the one behind it, if there is one and nothing is against
    it.
    """
    reasons = []
    for layer in (norm.args[0], *norm.users):
        gemm = read_gemm(layer) if isinstance(layer, fx.Node) and SPEC in layer.meta else None
        if not isinstance(gemm, GemmNode) or gemm.kind == "matmul" or not isinstance(layer, fx.Node):
            continue
        is_after = layer is norm.args[0]
        reason = _why_not(epochs(graph), norm, layer, gemm, is_after)
        if reason is None:
            _rewrite(graph, norm, layer, gemm, is_after)
            return True
        reasons.append(reason)
    if reasons:
        finding = Finding("batch-norm-kept", _path(norm), f"this batch norm is not folded: {reasons[0]}")
        program.findings += [] if finding in program.findings else [finding]
    return False


def _path(norm: fx.Node) -> str:
    """Of the module whose statistics or parameters it reads."""
    reads = [each for each in norm.all_input_nodes[1:] if each.op == "get_attr"]
    return str(reads[0].target).rpartition(".")[0] if reads else norm.name


def _why_not(epoch_of: dict[fx.Node, int], norm: fx.Node, layer: fx.Node, gemm: GemmNode, is_after: bool) -> str | None:
    """What keeps a batch norm from being folded into the layer that it is next to."""
    first, second = (layer, norm) if is_after else (norm, layer)
    site, geometry, seen = layer.meta[SITE], gemm.geometry, first.meta.get(META)
    if norm.args[3] is None or norm.args[5]:
        return "it has no running statistics: it norms with those of the batch"
    fwd = layer.meta[SPEC].fwd  # a scale that was learned is of what is cast without a batch norm in it
    if fwd.rhs.quantizer is not None:
        verb = "learned" if fwd.rhs.quantizer.learns else "has"
        return f"{fwd.rhs.quantizer.kind} {verb} a scale of the weight of {site} as it is"
    if not is_after and fwd.lhs.quantizer is not None:
        verb = "learned" if fwd.lhs.quantizer.learns else "has"
        return f"{fwd.lhs.quantizer.kind} {verb} a scale of what {site} is given"
    if len(first.users) > 1:
        return f"{'it' if is_after else site} is not all that uses what {site if is_after else 'it'} gives"
    if epoch_of[first] != epoch_of[second]:
        return "operations between it and the layer may change its input"
    dims = 2 if geometry is None else 2 + len(geometry.stride)
    if seen is None or len(seen.shape) != dims:
        return f"its features are not known to be those of {site}: a tensor of {dims} dims is expected"
    if not is_after and geometry is not None and (geometry.is_transposed or any(geometry.padding)):
        return f"{site} pads or spreads what it gives, so its shift is not one number per output"
    return None


def _rewrite(graph: fx.Graph, norm: fx.Node, layer: fx.Node, gemm: GemmNode, is_after: bool) -> None:
    x, gamma, beta, mean, var, _, _, eps = norm.args[:8]
    geometry = gemm.geometry
    is_in_first = gemm.kind == "linear_kn" or (geometry is not None and geometry.is_transposed)
    axis, groups = int(is_in_first == is_after), 1 if geometry is None else geometry.groups
    along: dict[str, Any] = {"axis": axis, "groups": groups}
    last = norm if is_after else layer
    last.prepend(layer) if is_after else None
    with graph.inserting_before(layer):
        s = graph.call_function(OPS["lp.norm_scale"].run, (gamma, var), {"eps": eps})
        t = graph.call_function(OPS["lp.norm_shift"].run, (beta, mean, s))
        if is_after:
            bias = graph.call_function(OPS["lp.fold_bias"].run, (gemm.rhs, gemm.bias, s, t))
        else:
            bias = graph.call_function(OPS["lp.fold_input_bias"].run, (gemm.rhs, gemm.bias, t), along)
        weight = graph.call_function(OPS["lp.fold_weight"].run, (gemm.rhs, s), along)
    weight.meta[WEIGHT] = True
    if META in gemm.rhs.meta:
        weight.meta[META] = gemm.rhs.meta[META]
    norm.replace_all_uses_with(layer if is_after else x)  # type: ignore[arg-type]
    layer.args = (gemm.lhs if is_after else x, weight, bias, *layer.args[3:])
    layer.kwargs = {name: value for name, value in layer.kwargs.items() if name not in ("weight", "weight_KN", "bias")}
    graph.erase_node(norm)
