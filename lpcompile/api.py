"""lpcompile(model, policy): compile a model in place under a policy; advance its clock; find its state.

policy -> phases -> per phase: graphs of leaves and modules -> passes -> installed as the forward of the same instances
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from lpcompile.capture.fast_paths import close_fast_paths, reopen_fast_paths
from lpcompile.capture.install import Variant, install, uninstall
from lpcompile.capture.leaf_code import install_composite, install_leaf
from lpcompile.capture.leaves import Leaf, composite_forward, find_leaves, is_leaf, part_graph
from lpcompile.capture.recorder import record
from lpcompile.capture.recording import Recording
from lpcompile.compiled import Compiled, PhaseCode, find_compiled, get_compiled, set_compiled
from lpcompile.errors import LoweringError, LpError
from lpcompile.policy import Policy, Site
from lpcompile.policy_file import load_policy
from passes.ir.gemm_nodes import Reading, read_gemm, site_names, stem_of
from passes.ir.program import SITE, STATE, Program, Unit, num_op
from passes.manager import Pass, parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES
from runtime.ops import OP_OF
from runtime.state import RunState

Model = TypeVar("Model", bound=nn.Module)
Recordings = Mapping[str, Sequence[Recording]]


def lpcompile(
    model: Model,
    policy: str | Path | Policy,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    mode: Literal["train", "infer"] = "train",
    strict: bool = False,
    seed: int = 0,
) -> Model:
    """Compile `model` in place, and return it: every GEMM that `policy` names runs in the formats it says.

    The instance, its class (by isinstance and by name), its parameters, hooks and state_dict stay what they were.
    GEMM-bearing modules are always reached. With example inputs one forward is run (twice for mode="train": training
    and evaluation) to capture products of activations and to share casts between modules; without them the report says
    what was not looked at. A call that the captured graphs do not fit runs the module's original forward, with its
    GEMM-bearing children compiled all the same.

    seed keys stochastic rounding. strict=True raises LoweringError, before anything is changed, if a named GEMM does
    not run as its policy says or a rule matches nothing. Compiling a compiled model replaces what was there.
    """
    loaded = load_policy(policy)
    if not isinstance(model, nn.Module):
        raise LpError("not a model", expected="a torch.nn.Module", got=type(model).__name__)
    if mode not in ("train", "infer"):
        raise LpError("not a mode", where="lpcompile(mode=...)", expected="train or infer", got=repr(mode))
    restore(model)
    leaves, unreached = find_leaves(model)
    recordings: Recordings = {}
    opaque: dict[str, str] = {}
    captured = example_inputs is not None or example_kwargs is not None
    close_fast_paths(model)
    named: list[str] = []
    try:
        if captured:
            recordings, opaque = _record(model, tuple(example_inputs or ()), dict(example_kwargs or {}), mode)
        state = RunState(seed=seed, watch_overflow=loaded.loss_scale.kind != "none")
        sites = _sites(leaves, recordings)
        phases = [
            _compile_phase(model, from_step, each, leaves, recordings, sites) for from_step, each in loaded.phases
        ]
        compiled = Compiled(loaded, state, sites, phases, unreached, opaque, captured)
        if strict:
            _refuse_if_not_lowered(compiled)
        _install(model, compiled, leaves, recordings)
        named = [leaf.path for leaf in leaves if any(leaf.name in phase.program.choices for phase in phases)]
    finally:
        reopen_fast_paths(model, compiled=named)
    set_compiled(model, compiled)
    return model


def restore(model: nn.Module) -> None:
    """Undo lpcompile: every module gets its own forward back. Does nothing to a model that was not compiled."""
    if find_compiled(model) is None:
        return
    for module in model.modules():
        uninstall(module)
        module.__dict__.pop(STATE, None)
    reopen_fast_paths(model)
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, CountMicroBatches)]:
        del hooks[key]
    set_compiled(model, None)


def advance(model: nn.Module, to_step: int | None = None) -> None:
    """Move schedule and stochastic streams on by one optimizer step, or to `to_step` when a run is resumed."""
    compiled = get_compiled(model)
    state = compiled.state
    state.step = state.step + 1 if to_step is None else to_step
    state.micro_batch = 0
    state.phase = sum(phase.from_step <= state.step for phase in compiled.phases) - 1


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Call advance(model) after every step of `optimizer`, for a training loop of one's own."""
    get_compiled(model)
    optimizer.register_step_post_hook(lambda *_: advance(model))


def run_state(model: nn.Module) -> RunState | None:
    """The state that a compiled model's ops share; None if the model was not compiled."""
    compiled = find_compiled(model)
    return compiled.state if compiled else None


def original_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state_dict with the keys of the uncompiled model: what a policy appended under `_lp.` is left out."""
    return {key: value for key, value in model.state_dict().items() if "_lp." not in key}


def gemm_sites(model: nn.Module) -> list[Site]:
    """The GEMM-bearing leaves of a model as a policy sees them."""
    return _sites(find_leaves(model)[0], {})


def _record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str
) -> tuple[Recordings, dict[str, str]]:
    """Recordings of one forward in evaluation mode and, for mode="train", one in training mode."""
    recordings: dict[str, list[Recording]] = {}
    opaque: dict[str, str] = {}
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        for training in (True, False) if mode == "train" else (False,):
            if model.training is not training:
                model.train(training)
            result = record(model, args, kwargs, is_leaf=is_leaf)
            for path, found in result.recordings.items():
                recordings.setdefault(path, []).extend(found)
            opaque.update({path: str(reason) for path, reason in result.opaque.items()})
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    return recordings, opaque


def _sites(leaves: Sequence[Leaf], recordings: Recordings) -> list[Site]:
    count = sum(leaf.index is not None for leaf in leaves)
    sites = [Site(leaf.name, leaf.op, leaf.index, count, leaf.n, leaf.k) for leaf in leaves]
    seen = set()
    for path, variants in recordings.items():
        for recording in variants:
            for base, gemm, _ in _functional_gemms(path, recording):
                for name in site_names(gemm, base):
                    if name not in seen:
                        seen.add(name)
                        sites.append(Site(name, gemm.op, None, count, None, None))
    return sites


def _functional_gemms(path: str, recording: Recording) -> list[tuple[str, Reading, Any]]:
    """(name, reading, node) of the GEMMs that a module writes as operations, counted per stem in program order."""
    numbers: Counter[str] = Counter()
    found = []
    for node in recording.graph.nodes:
        gemm = read_gemm(node)
        if gemm is not None:
            stem = stem_of(gemm)
            name = f"{stem}_{numbers[stem]}"
            numbers[stem] += 1
            found.append((f"{path}.{name}" if path else name, gemm, node))
    return found


def _compile_phase(
    model: nn.Module, from_step: int, policy: Policy, leaves: Sequence[Leaf], recordings: Recordings, sites: list[Site]
) -> PhaseCode:
    resolution = policy.resolve(sites)
    program = _build_program(model, leaves, recordings)
    program.specs = {name: spec for name, spec in resolution.specs.items() if spec is not None}
    counted = {"lp.quantize": 0}

    def count_casts(done: Pass, program: Program) -> None:
        if done.name == "insert-casts":
            counted["lp.quantize"] = num_op(program, "lp.quantize")

    records = run_passes(program, parse_passes(PIPELINES["default"], PASSES), after_each=count_casts)
    for name in program.specs.keys() - program.choices.keys() - program.refusals.keys():
        program.refusals[name] = "no graph of the model holds this GEMM"
    return PhaseCode(from_step, policy, program, resolution, records, counted["lp.quantize"])


def _build_program(model: nn.Module, leaves: Sequence[Leaf], recordings: Recordings) -> Program:
    units: dict[str, Unit] = {}
    modules = dict(model.named_modules())
    for leaf in leaves:
        graph = part_graph(modules[leaf.path], leaf)
        for node in graph.nodes:
            if read_gemm(node) is not None:
                node.meta[SITE] = leaf.name
        units[leaf.name] = Unit(leaf.name, graph, "leaf")
    for path, variants in recordings.items():
        for number, recording in enumerate(variants):
            for name, _, node in _functional_gemms(path, recording):
                node.meta[SITE] = name
            units[_unit_name(path, number)] = Unit(path, copy.deepcopy(recording.graph), "module")
    parameter = next(model.parameters(), None)
    return Program(units, {}, device=parameter.device.type if parameter is not None else "cpu")


def _unit_name(path: str, number: int) -> str:
    return f"{path}#{number}"


def _install(model: nn.Module, compiled: Compiled, leaves: Sequence[Leaf], recordings: Recordings) -> None:
    """Give every leaf that a phase names, and every module whose graph a phase changed, its compiled forward."""
    modules = dict(model.named_modules())
    for path, parts in groupby(leaves, key=lambda leaf: leaf.path):
        _install_leaf(modules[path], list(parts), compiled)
    for path, variants in recordings.items():
        for index, phase in enumerate(compiled.phases):
            units_of_path = [phase.program.units[_unit_name(path, number)] for number in range(len(variants))]
            if any(_is_touched(unit) for unit in units_of_path):
                modules[path].__dict__[STATE] = compiled.state
                changed = [Variant.of(recording, unit.graph) for recording, unit in zip(variants, units_of_path)]
                install(modules[path], changed, phase=index, clock=compiled.state)

    if _rounds_stochastically(compiled):
        model.register_forward_pre_hook(CountMicroBatches(compiled.state))


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


@dataclass(frozen=True)
class CountMicroBatches:
    """A forward pre-hook of the root, which recomputation never calls: each training forward is one micro-batch."""

    state: RunState

    def __call__(self, model: nn.Module, args: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self.state.micro_batch += 1


def _rounds_stochastically(compiled: Compiled) -> bool:
    return any("stochastic" in str(spec) for phase in compiled.phases for spec in phase.program.specs.values())


def _is_touched(unit: Unit) -> bool:
    """A module graph that no pass changed is not installed: the original forward runs its compiled children as well."""
    return any(node.op == "call_function" and node.target in OP_OF for node in unit.graph.nodes)


def _refuse_if_not_lowered(compiled: Compiled) -> None:
    for phase in compiled.phases:
        refusals = [f"{site}: {reason}" for site, reason in phase.program.refusals.items()]
        if refusals or phase.resolution.unmatched:
            raise LoweringError(
                "; ".join(refusals + phase.resolution.unmatched),
                where=f"policy {phase.policy.name}, strict",
                expected="every named GEMM to run as its policy says and every rule to match",
                hint="strict=False, or another rule for these",
            )
