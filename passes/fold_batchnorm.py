"""fold-batchnorm: a batch norm in evaluation mode goes into weight and bias of the layer next to it, before they are
cast.

    %c = call_module[conv](%x)      becomes      %s = lp.norm_scale(weight, running_var)     of bn
    %y = call_module[bn](%c)                     %t = lp.norm_shift(bias, running_mean, %s)
                                                 %y = call_module[conv](%x, lp_affine=(%s, %t))

and conv's graph computes lp.fold_weight and lp.fold_bias of what it is handed. So weights stay in their module, another
call of the same conv has another batch norm or none, and what is cast is the folded weight. A batch norm before a layer
is handed as `lp_input_affine`, where no window reaches into a padding.
"""

import copy
import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx

from passes.finding import Finding
from passes.ir.gemm_nodes import GemmNode, argument, read_gemm
from passes.ir.program import AFFINE, FOLDED, INPUT_AFFINE, SPEC, WEIGHT, Program, Unit
from passes.ir.types import META
from passes.manager import Pass
from runtime.ops.dialect import OPS
from runtime.ops.plan import parse_geometry


@dataclass(frozen=True)
class _Fold:
    """A batch norm that goes into the call of a leaf; `keyword` says on which side of it it stands."""

    caller: Unit
    call: fx.Node
    leaf: Unit
    norm_call: fx.Node
    norm: Unit
    keyword: str


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """For inference. Only next to GEMMs that the policy names and annotate did not refuse; a batch norm that stays
    there is a finding, with the reason.
    """

    name: ClassVar[str] = "fold-batchnorm"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "uncast")

    def run(self, program: Program) -> bool:
        by_leaf: dict[str, list[_Fold]] = defaultdict(list)
        for unit in program.units.values():
            if unit.kind == "module":
                for fold in _find_folds(program, unit):
                    by_leaf[fold.leaf.path].append(fold)
        for folds in by_leaf.values():
            reason = _why_not_alike(folds)
            for fold in folds:
                if reason:
                    _keep(program, fold.norm, reason)
                else:
                    _fold_call(fold)
            if not reason:
                keywords = {fold.keyword for fold in folds}
                folds[0].leaf.fed = _fed_copy(folds[0].leaf.graph, [k for k in (INPUT_AFFINE, AFFINE) if k in keywords])
        return any(FOLDED in fold.call.meta for folds in by_leaf.values() for fold in folds)


def norm_node(graph: fx.Graph) -> fx.Node | None:
    """The batch norm of a leaf that is one."""
    return next((node for node in graph.nodes if node.target is F.batch_norm), None)


def _find_folds(program: Program, caller: Unit) -> list[_Fold]:
    found = []
    for node in caller.graph.nodes:
        norm = program.called_leaf(caller, node)
        if norm is None or norm_node(norm.graph) is None or not _is_plain_call(node):
            continue
        sides = [(node.args[0], AFFINE)] + [(user, INPUT_AFFINE) for user in node.users]
        reasons = []
        for call, keyword in sides:
            leaf = program.called_leaf(caller, call)
            if leaf is None or _gemm(leaf) is None or not _is_plain_call(call):
                continue
            fold = _Fold(caller, call, leaf, node, norm, keyword)
            reason = _why_not(fold)
            if reason is None:
                found.append(fold)
                break
            reasons.append(reason)
        else:
            if reasons:
                _keep(program, norm, reasons[0])
    return found


def _is_plain_call(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def _gemm(leaf: Unit) -> fx.Node | None:
    """The GEMM of a leaf that the policy names."""
    return next((node for node in leaf.graph.nodes if SPEC in node.meta), None)


def _why_not(fold: _Fold) -> str | None:
    """What keeps a batch norm from being folded into the leaf that it is next to."""
    first, second = (fold.call, fold.norm_call) if fold.keyword == AFFINE else (fold.norm_call, fold.call)
    node, gemm = norm_node(fold.norm.graph), _read(fold.leaf)
    assert node is not None
    if argument(node, 5, "training"):
        return "it has no running statistics: it norms with those of the batch"
    for unit in (fold.norm, fold.leaf):
        if unit.is_observed:
            return f"hooks see what {unit.path} is given or gives"
    if reason := _why_learned(fold):
        return reason
    if len(first.users) > 1:
        return (
            f"it is not all that uses what {fold.leaf.path} gives"
            if fold.keyword == AFFINE
            else (f"{fold.leaf.path} is not all that uses what it gives")
        )
    if fold.leaf.fed is not None:
        return f"{fold.leaf.path} is handed something else already"
    seen = first.meta.get(META)
    geometry = parse_geometry(gemm.geometry)
    dims = 2 if geometry is None else 2 + len(geometry.stride)
    if seen is None or len(seen.shape) != dims:
        return f"its features are not known to be those of {fold.leaf.path}: a tensor of {dims} dims is expected"
    if fold.keyword == INPUT_AFFINE:
        if geometry is not None and (geometry.is_transposed or any(geometry.padding)):
            return f"{fold.leaf.path} pads or spreads what it gives, so its shift is not one number per output"
        if gemm.lhs.op != "placeholder":
            return f"{fold.leaf.path} pads what it gives, so its shift is not one number per output"
        if first.next is not second:
            return "other operations run between it and the layer, which may change its input"
    return None


def _why_not_alike(folds: list[_Fold]) -> str | None:
    """The fed graph of a leaf takes what every call of it hands, or no call."""
    by_call: dict[fx.Node, set[str]] = defaultdict(set)
    for fold in folds:
        by_call[fold.call].add(fold.keyword)
    if len(set(map(frozenset, by_call.values()))) == 1:
        return None
    return f"calls of {folds[0].leaf.path} have batch norms on different sides"


def _why_learned(fold: _Fold) -> str | None:
    """A scale that was learned is of the weight, or of the input, without a batch norm in it."""
    node = _gemm(fold.leaf)
    assert node is not None
    fwd = node.meta[SPEC].fwd
    if fwd.rhs.quantizer is not None:
        return f"{fwd.rhs.quantizer.kind} learned a scale of the weight of {fold.leaf.path} as it is"
    if fold.keyword == INPUT_AFFINE and fwd.lhs.quantizer is not None:
        return f"{fwd.lhs.quantizer.kind} learned a scale of what {fold.leaf.path} is given"
    return None


def _keep(program: Program, norm: Unit, reason: str) -> None:
    finding = Finding("batch-norm-kept", norm.path, f"this batch norm is not folded: {reason}")
    if finding not in program.findings:  # another recorded call said so
        program.findings.append(finding)


def _fold_call(fold: _Fold) -> None:
    graph, call = fold.caller.graph, fold.call
    node = norm_node(fold.norm.graph)
    assert node is not None
    path = str(fold.norm_call.target)
    with graph.inserting_before(fold.norm_call if fold.keyword == INPUT_AFFINE else call):
        mean, var, weight, bias = (_read_child(graph, path, operand) for operand in node.args[1:5])
        eps = argument(node, 7, "eps")
        s = graph.call_function(OPS["lp.norm_scale"].run, (weight, var), {"eps": eps})
        t = graph.call_function(OPS["lp.norm_shift"].run, (bias, mean, s))
    call.kwargs = {**call.kwargs, fold.keyword: (s, t)}
    call.meta[FOLDED] = ",".join(filter(None, (call.meta.get(FOLDED), path)))
    if fold.keyword == AFFINE:
        call.meta[META] = fold.norm_call.meta.get(META, call.meta[META])
        fold.norm_call.replace_all_uses_with(call)
    else:
        fold.norm_call.replace_all_uses_with(fold.norm_call.args[0])  # type: ignore[arg-type]
    graph.erase_node(fold.norm_call)


def _read_child(graph: fx.Graph, path: str, operand: object) -> fx.Node | None:
    """The parameter or buffer of a child that the child's graph reads."""
    if not isinstance(operand, fx.Node):
        return None
    node = graph.get_attr(f"{path}.{operand.target}")
    if META in operand.meta:
        node.meta[META] = operand.meta[META]
    return node


def _read(leaf: Unit) -> GemmNode:
    node = _gemm(leaf)
    assert node is not None
    gemm = read_gemm(node)
    assert isinstance(gemm, GemmNode)
    return gemm


def _fed_copy(graph: fx.Graph, keywords: list[str]) -> fx.Graph:
    """The leaf's graph with weight and bias folded by what it is handed, (s, t) under each keyword."""
    fed = copy.deepcopy(graph)
    node = next(node for node in fed.nodes if SPEC in node.meta)
    gemm = read_gemm(node)
    assert isinstance(gemm, GemmNode)
    geometry = parse_geometry(gemm.geometry)
    is_in_first = gemm.kind == "linear_kn" or (geometry is not None and geometry.is_transposed)
    groups = 1 if geometry is None else geometry.groups
    weight, bias = gemm.rhs, gemm.bias
    for keyword in keywords:
        with fed.inserting_after([each for each in fed.nodes if each.op == "placeholder"][-1]):
            handed = fed.placeholder(keyword, default_value=None)
        with fed.inserting_before(node):
            s, t = (fed.call_function(operator.getitem, (handed, position)) for position in (0, 1))
            axis = int(is_in_first) if keyword == AFFINE else int(not is_in_first)
            along: dict[str, Any] = {"axis": axis, "groups": groups}
            if keyword == AFFINE:
                bias = fed.call_function(OPS["lp.fold_bias"].run, (weight, bias, s, t))
            else:
                bias = fed.call_function(OPS["lp.fold_input_bias"].run, (weight, bias, t), along)
            weight = fed.call_function(OPS["lp.fold_weight"].run, (weight, s), along)
            weight.meta[WEIGHT] = True
    node.args = (node.args[0], weight, bias, *node.args[3:])
    return fed
