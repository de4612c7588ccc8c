"""Whole graph: the exported graph of a model under each phase of its policy, for mode="infer".

The plan of the model (sites, specs, choices) is that of leaves and interception, which run every other call.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lpcompile.compiled import Compiled
from lpcompile.errors import NotSupported
from lpcompile.frontends.export.forward import Arguments, ExportedForward
from lpcompile.frontends.export.trace import Exported, export_graph
from lpcompile.frontends.leaves.find import Leaf
from lpcompile.plan import PhaseCode, Sight
from passes.finding import Finding
from passes.ir.gemm_nodes import GemmNode, read_gemm, site_names
from passes.ir.program import SITE, Program, Unit, num_op
from passes.manager import Pass, parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
ROOT = "#0"
"""The name of the unit that is the whole model."""


def compile_exported(model: nn.Module, compiled: Compiled, call: Call) -> Exported | None:
    """Give each phase's program the graph of the model in evaluation mode, with its passes run. None, and a finding,
    where the model has none; the model is as it was before anything is installed.
    """
    try:
        exported = exported_call(model, compiled.leaves, call)
    except NotSupported as error:
        where = error.where or "the model"
        what = f"no graph of the whole model: {error.what}; leaves and interception run it"
        for phase in compiled.phases:
            phase.program.findings.append(Finding("not-exported", where, what))
        return None
    for sight in sights_of(exported):
        compiled.find(sight)
    for phase in compiled.phases:
        _compile_phase(phase, exported)
    return exported


def exported_call(model: nn.Module, leaves: Sequence[Leaf], call: Call) -> Exported:
    """The graph of the call in evaluation mode. Raises NotSupported."""
    if any(not leaf.path and leaf.part for leaf in leaves):
        raise NotSupported(f"it is one layer of several products, {type(model).__name__}, which is called as it is")
    watched = next((path for path, module in model.named_modules() if path and _is_observed(module)), None)
    if watched is not None:
        raise NotSupported("hooks, or a forward of its own, see what it is given", where=watched)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(False) if model.training else None
        return export_graph(model, *Arguments.of(model, *call).named(*call), leaves)
    finally:
        for module, was_training in modes:
            module.training = was_training


def install_exported(model: nn.Module, compiled: Compiled, exported: Exported, call: Call) -> None:
    """Let the graphs run the calls that they stand for. Nothing is installed after it."""
    graphs = [phase.program.units[ROOT].graph for phase in compiled.phases]
    ExportedForward.install(model, call, exported, graphs, compiled.state)


def _compile_phase(phase: PhaseCode, exported: Exported) -> None:
    whole, unit = phase.program, Unit("", copy.deepcopy(exported.graph), "module")
    program = Program({ROOT: unit}, whole.specs, device=whole.device)

    def count_casts(done: Pass, program: Program) -> None:
        if done.name == "insert-casts":
            phase.num_quantize_before = num_op(program, "lp.quantize")

    phase.records = run_passes(program, parse_passes(PIPELINES["infer"], PASSES), after_each=count_casts)
    phase.num_quantize_after = num_op(program, "lp.quantize")
    whole.units, whole.passes = program.units, program.passes
    whole.findings += program.findings


def sights_of(exported: Exported) -> list[Sight]:
    """The products that the graph shows."""
    sights = []
    for node in exported.graph.nodes:
        gemm = read_gemm(node)
        if gemm is not None:
            kind = gemm.kind if isinstance(gemm, GemmNode) else "matmul"
            sights += [Sight(name, gemm.op, kind) for name in site_names(gemm, node.meta[SITE])]
    return sights


def _is_observed(module: nn.Module) -> bool:
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return "forward" in vars(module) or any(getattr(module, name, None) for name in hooks)
