"""Whole graphs: what mode="infer" and the text form compile, from the graphs of one recorded call per module.

The front end `export` takes this over; until then this file is the only door to the recorder.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import fx, nn

from lpcompile.capture.batch_norm import guarding_folds
from lpcompile.capture.calls import Calls, record_call
from lpcompile.capture.cast_origins import with_origins
from lpcompile.capture.frame import FunctionCall
from lpcompile.capture.leaf_code import install_composite, install_leaf
from lpcompile.capture.recorded_sites import Recordings, build_program, find_sites, lost_sites, note_repeated, unit_name
from lpcompile.capture.recording import Recording
from lpcompile.capture.torch_layers import without_carriers
from lpcompile.capture.variants import Variant, install
from lpcompile.compiled import Compiled
from lpcompile.frontends.leaves.find import Leaf, Unreached, composite_forward, find_leaves
from lpcompile.plan import PhaseCode
from lpcompile.policy.describe import describe
from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from lpcompile.reporting.checks import check_policy
from passes.ir.program import HANDED, STATE, Program, Unit, num_op
from passes.manager import Pass, parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES
from runtime.ops.dialect import OP_OF
from runtime.state import RunState


def compile_recorded(
    model: nn.Module, policy: Policy, state: RunState, call: tuple[tuple[Any, ...], dict[str, Any]] | None, mode: str,
    strict: bool,
) -> tuple[Compiled, Calls]:  # fmt: skip
    """A model as its recorded graphs under a policy, and the call they were recorded from, which install needs."""
    calls = Calls() if call is None else record_call(model, *call, mode)
    leaves, unreached = find_leaves(model)
    sites = describe(find_sites(leaves, calls), model, calls.reached if calls.num else None)
    phases = [_compile_phase(model, from_step, each, leaves, calls, sites, mode) for from_step, each in policy.phases]
    unreached += _own_functions(calls)
    return Compiled(policy, state, sites, phases, leaves, unreached, mode, strict, *facts_of(calls)), calls


def facts_of(calls: Calls) -> tuple[frozenset[str] | None, dict[str, str]]:
    """Which modules the calls reached, and those without a graph, with the reason."""
    return frozenset(calls.reached) if calls.num else None, {path: str(why) for path, why in calls.opaque.items()}


def _own_functions(calls: Calls) -> list[Unreached]:
    """Modules that call an autograd.Function, such as the linear that ZeRO-3 puts in the place of torch's."""
    found = []
    for path, variants in calls.recordings.items():
        nodes = [node for recording in variants for node in recording.graph.nodes]
        for name in sorted({str(node.target.__name__) for node in nodes if isinstance(node.target, FunctionCall)}):
            found.append(Unreached(path, f"it calls {name}, an autograd.Function, whose products, if any, are its own"))
    return found


def _compile_phase(
    model: nn.Module,
    from_step: int,
    policy: Policy,
    leaves: Sequence[Leaf],
    calls: Calls,
    sites: list[Site],
    mode: str,
) -> PhaseCode:
    resolution = policy.resolve(sites)
    program = named_program(model, policy, leaves, calls.recordings, sites, resolution, mode)
    counted = {"lp.quantize": 0}

    def count_casts(done: Pass, program: Program) -> None:
        if done.name == "insert-casts":
            counted["lp.quantize"] = num_op(program, "lp.quantize")

    records = run_passes(program, parse_passes(PIPELINES[mode], PASSES), after_each=count_casts)
    lost = lost_sites(calls)
    for name in program.specs.keys() - program.choices.keys() - program.refusals.keys():
        program.refusals[name] = lost[name][1] if name in lost else "no graph of the model holds this GEMM"
    casts = counted["lp.quantize"], num_op(program, "lp.quantize")
    return PhaseCode(from_step, policy, program, resolution, records, *casts)


def named_program(
    model: nn.Module,
    policy: Policy,
    leaves: Sequence[Leaf],
    recordings: Recordings,
    sites: list[Site],
    resolution: Resolution,
    mode: str,
) -> Program:
    """The graphs of a model with what the policy says of their sites, checked."""
    program = build_program(model, leaves, recordings, mode)
    program.specs = {name: spec for name, spec in resolution.specs.items() if spec is not None}
    note_repeated(model, leaves, program)
    program.findings += check_policy(model, leaves, sites, policy, resolution)
    return program


def install_recorded(model: nn.Module, compiled: Compiled, calls: Calls) -> None:
    """Give every leaf that a phase names, and every module whose graph a phase changed, its compiled forward."""
    modules = dict(model.named_modules())
    for path, parts in groupby(compiled.leaves, key=lambda leaf: leaf.path):
        _install_leaf(modules[path], list(parts), compiled)
    for path, variants in calls.recordings.items():
        for index, phase in enumerate(compiled.phases):
            units_of_path = [phase.program.units[unit_name(path, number)] for number in range(len(variants))]
            if any(_is_touched(unit) for unit in units_of_path):
                modules[path].__dict__[STATE] = compiled.state
                changed = [
                    Variant.of(_guarded(each, unit, modules[path], phase.program), _noting(unit))
                    for each, unit in zip(variants, units_of_path)
                ]
                install(modules[path], changed, phase=index, clock=compiled.state)


def _guarded(recording: Recording, unit: Unit, module: nn.Module, program: Program) -> Recording:
    """The recording with the guard of what passes made of its graph."""
    if unit.is_forward_only:
        recording = without_carriers(recording, module)
    return replace(recording, guard=guarding_folds(recording.guard, unit, module, program))


def _noting(unit: Unit) -> fx.Graph:
    """The graph with the origins of its casts; where the guard shuts out hooks, nothing comes between."""
    return unit.graph if unit.is_forward_only else with_origins(unit.graph)


def _install_leaf(module: nn.Module, parts: list[Leaf], compiled: Compiled) -> None:
    units: list[dict[str, Unit] | None] = [
        {leaf.part: phase.program.units[leaf.name] for leaf in parts}
        if any(leaf.name in phase.program.choices for leaf in parts)
        else None
        for phase in compiled.phases
    ]
    forward = composite_forward(module)
    if not any(units):
        return
    if forward is not None:
        install_composite(module, forward, units, compiled.state)
    else:
        install_leaf(module, [None if each is None else each[""] for each in units], compiled.state)


def keeps_constants(compiled: Compiled) -> bool:
    graphs = [graph for phase in compiled.phases for _, graph in phase.program.graphs()]
    return any("lifetime" in node.kwargs for graph in graphs for node in graph.nodes if node.target in OP_OF)


def _is_touched(unit: Unit) -> bool:
    """A module graph that no pass changed is not installed: the original forward runs its compiled children as well."""
    return any(
        (node.op == "call_function" and node.target in OP_OF) or {*HANDED} & {*node.kwargs} for node in unit.graph.nodes
    )
