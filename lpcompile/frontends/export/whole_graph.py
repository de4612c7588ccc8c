"""Whole graph: the exported graph of a model under each phase of its policy, for mode="infer".

The plan of the model (sites, specs, choices) is that of leaves and interception, which run every other call.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lpcompile.compiled import Compiled
from lpcompile.errors import NotSupported
from lpcompile.frontends.export.forward import Arguments, ExportedForward
from lpcompile.frontends.export.trace import Exported, export_graph
from lpcompile.frontends.leaves.find import Leaf
from lpcompile.plan import PhaseCode, Sight
from lpcompile.policy.rules import Site
from passes.finding import Finding
from passes.ir.gemm_nodes import GemmNode, Unreadable, read_gemm, site_names
from passes.ir.program import SITE, Program, Unit, num_op
from passes.manager import Pass, parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
ROOT = "#0"
"""The name of the unit that is the whole model."""


def compile_exported(model: nn.Module, compiled: Compiled, ran: Collection[str], call: Call) -> Exported | None:
    """Give each phase's program the graph of the model in evaluation mode, with its passes run. None, and a finding,
    where the model has none, or one that does not cast what the plan says runs: `ran` are the sites that a call in
    evaluation mode ran. The model is as it was before anything is installed.
    """
    try:
        exported = exported_call(model, compiled.leaves, call)
        _check_shows(exported, compiled, ran)
        sights = {sight.name: sight for sight in sights_of(exported)}
        new = [each for name, each in sights.items() if not any(name in p.resolution.specs for p in compiled.phases)]
        sites = [compiled.site_of(each) for each in new]
        drafts = [_compile_phase(phase, exported, new, sites) for phase in compiled.phases]
    except NotSupported as error:
        where = error.where or "the model"
        what = f"no graph of the whole model: {error.what}; leaves and interception run it"
        for phase in compiled.phases:
            phase.program.findings.append(Finding("not-exported", where, what))
        return None
    for sight in new:
        compiled.find(sight)
    for phase, draft in zip(compiled.phases, drafts):
        phase.records = draft.records
        phase.num_quantize_before, phase.num_quantize_after = draft.num_quantize_before, draft.num_quantize_after
        phase.program.units, phase.program.passes = draft.program.units, draft.program.passes
        phase.program.findings += draft.program.findings
    return exported


def _check_shows(exported: Exported, compiled: Compiled, ran: Collection[str]) -> None:
    """Raises NotSupported where the graph lacks a product that the plan runs."""
    called = {node.target for node in exported.graph.find_nodes(op="call_module")}
    shown = {sight.name for sight in sights_of(exported)}
    shown |= {leaf.name for leaf in compiled.leaves if leaf.path in called}
    for phase in compiled.phases:
        for site in phase.products:
            if site in ran and site not in shown:
                raise NotSupported("torch.export does not show this product", where=site)


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


def _compile_phase(phase: PhaseCode, exported: Exported, new: Sequence[Sight], sites: Sequence[Site]) -> PhaseCode:
    """The graph under a phase, of which `new`, on `sites`, is not planned yet. Raises NotSupported where the graph does
    not cast what the plan says runs.
    """
    draft = PhaseCode.of(phase.from_step, phase.policy, phase.program.device)
    specs = {**phase.program.specs, **draft.ask(new, sites, are_all=False)}
    unit = Unit("", copy.deepcopy(exported.graph), "module")
    program = draft.program = Program({ROOT: unit}, specs, device=phase.program.device)
    refused = {*phase.program.refusals, *(sight.name for sight in new if sight.reason)}

    def check_casts(done: Pass, program: Program) -> None:
        if done.name == "insert-casts":
            draft.num_quantize_before = num_op(program, "lp.quantize")
            for site, reason in _uncast(program, phase.program):
                if site not in refused:
                    raise NotSupported(f"its graph does not cast this product: {reason}", where=site)

    draft.records = run_passes(program, parse_passes(PIPELINES["infer"], PASSES), after_each=check_casts)
    draft.num_quantize_after = num_op(program, "lp.quantize")
    return draft


def _uncast(program: Program, plan: Program) -> Iterator[tuple[str, str]]:
    """Named sites whose forward torch runs after casts were inserted, with the reason."""
    for _, graph in program.graphs():
        for node in graph.nodes:
            gemm, site = read_gemm(node), node.meta.get(SITE)
            for name in site_names(gemm, site) if gemm is not None and site is not None else ():
                if name in program.specs:
                    yield name, program.refusals.get(name, "no pass reads it")
    for site, choices in program.choices.items():
        if "fwd" in program.refused_roles(site) and "fwd" not in plan.refused_roles(site):
            yield site, choices["fwd"].reason


def sights_of(exported: Exported) -> list[Sight]:
    """The products that the graph shows."""
    sights = []
    for node in exported.graph.nodes:
        gemm = read_gemm(node)
        if gemm is not None:
            kind = gemm.kind if isinstance(gemm, GemmNode) else "matmul"
            reason = gemm.reason if isinstance(gemm, Unreadable) else ""
            sights += [Sight(name, gemm.op, kind, reason=reason) for name in site_names(gemm, node.meta[SITE])]
    return sights


def _is_observed(module: nn.Module) -> bool:
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return "forward" in vars(module) or any(getattr(module, name, None) for name in hooks)
