"""lpcompile(model, policy): compile a model in place under a policy; advance its clock; find its state.

policy -> phases -> per phase: graphs of leaves and modules -> passes -> installed as the forward of the same instances
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import fx, nn

from lpcompile.capture.batch_norm import guarding_folds
from lpcompile.capture.calls import Calls, record_call
from lpcompile.capture.cast_origins import with_origins
from lpcompile.capture.children import MARK
from lpcompile.capture.frame import FunctionCall
from lpcompile.capture.recording import Recording
from lpcompile.capture.torch_layers import without_carriers
from lpcompile.collector import no_full_collections
from lpcompile.compiled import COMPILED, JOINT, Compiled, PhaseCode, find_compiled, get_compiled
from lpcompile.errors import LoweringError, LpError
from lpcompile.frontends.fast_paths import close_fast_paths, reopen_fast_paths
from lpcompile.frontends.install import RECORD, Variant, install, uninstall
from lpcompile.frontends.joint.warnings_once import leave_warnings_once_out_of_graphs
from lpcompile.frontends.leaves.code import install_composite, install_leaf
from lpcompile.frontends.leaves.find import Leaf, Unreached, composite_forward, find_leaves
from lpcompile.policy.describe import describe
from lpcompile.policy.file import load_policy
from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from lpcompile.quantizers import install_quantizers, take_quantizers
from lpcompile.reporting.checks import check_policy
from lpcompile.sites import Recordings, build_program, find_sites, lost_sites, note_repeated, unit_name
from passes.choose_accumulator import ChooseAccumulator
from passes.finding import Finding
from passes.ir.program import HANDED, STATE, Program, Unit, num_op
from passes.manager import Pass, parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES
from runtime.ops.dialect import OP_OF
from runtime.quantize.learned.quantizer import Learned
from runtime.quantize.store import STORE as QUANTIZERS
from runtime.quantize.store import find_store
from runtime.state import RunState

Model = TypeVar("Model", bound=nn.Module)


@no_full_collections()
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

    mode="infer" is for evaluation under torch.no_grad(): batch norms, sums and activations go into the product next to
    them, and graphs keep nothing that only a gradient needs. With gradients, or hooks, the original forward runs; of a
    graph that only has batch norms folded, with gradients, the graph, within a few ulp of the original.

    seed keys stochastic rounding. strict=True raises LoweringError if a named GEMM does not run as its policy says or
    a check (lpcompile/reporting/checks.py) finds something wrong. Compiling a compiled model replaces what was there;
    whatever raises leaves the model as it was. A part of a compiled model, and a model with a compiled part, are
    refused.
    """
    loaded = load_policy(policy)
    if not isinstance(model, nn.Module):
        raise LpError("not a model", expected="a torch.nn.Module", got=type(model).__name__)
    if mode not in ("train", "infer"):
        raise LpError("not a mode", where="lpcompile(mode=...)", expected="train or infer", got=repr(mode))
    if JOINT in vars(model):
        raise LpError("this model has a joint front end", where="lpcompile", hint="remove_joint(model) first")
    args, kwargs = example_call(example_inputs, example_kwargs)
    with recompiling(model) as quantizers:
        captured = example_inputs is not None or example_kwargs is not None
        calls = record_call(model, args, kwargs, mode) if captured else Calls()
        state = RunState(seed=seed, watch_overflow=loaded.loss_scale.kind != "none")
        install_compiled(model, _compile(model, loaded, state, calls, mode, strict), quantizers)
    return model


def example_call(
    args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the call that example inputs stand for."""
    if args is not None and not isinstance(args, tuple | list):
        raise LpError(
            "the examples are not the arguments of a call",
            where="example_inputs",
            expected="a tuple, one element per argument",
            got=type(args).__name__,
            hint="example_inputs=(x,)",
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise LpError("not keywords", where="example_kwargs", expected="a dict by name", got=type(kwargs).__name__)
    return tuple(args or ()), dict(kwargs or {})


@contextmanager
def recompiling(model: nn.Module) -> Iterator[dict[str, Learned]]:
    """The model without what an earlier compilation installed, to be compiled anew; if that fails, with it again. Gives
    the quantizers with state that it had.
    """
    before = find_compiled(model)
    _refuse_parts(model, before)
    held = [(module, type(module), _installed(module)) for module in model.modules()]
    hooks = [(module, dict(module._forward_pre_hooks)) for module in model.modules() if COMPILED in vars(module)]
    store, quantizers = find_store(model), _take_away(model)
    close_fast_paths(model)
    try:
        yield quantizers
    except BaseException:
        _take_away(model)
        for module, kind, values in held:
            module.__class__ = kind
            vars(module).update(values)
        for module, by_key in hooks:
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(by_key)
        if store is not None:
            model.add_module(QUANTIZERS, store)
        raise
    finally:
        reopen_fast_paths(model, compiled=_named_leaves(find_compiled(model)))


def _installed(module: nn.Module) -> dict[str, Any]:
    """What of a module's __dict__ is lpcompile's."""
    return {name: vars(module)[name] for name in (RECORD, MARK, STATE, COMPILED) if name in vars(module)}


def _take_away(model: nn.Module) -> dict[str, Learned]:
    """Give every module its own forward back; the quantizers with state that the model had."""
    for module in model.modules():
        uninstall(module)
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, CountMicroBatches | WatchWeights)]:
            del hooks[key]
        for name in _installed(module):
            del vars(module)[name]
    return take_quantizers(model)


def _refuse_parts(model: nn.Module, own: Compiled | None) -> None:
    """A module has one forward: what another compilation installed in the model would be lost to it."""
    for path, module in model.named_modules():
        compiled, state = vars(module).get(COMPILED), vars(module).get(STATE)
        if compiled is not None and compiled is not own:
            what, whose = "this module is compiled already, by itself", "that module"
        elif state is not None and (own is None or state is not own.state):
            what, whose = "this module is a part of a compiled model", "the model that was compiled"
        else:
            continue
        raise LpError(
            what,
            where=f"lpcompile: {path or '(root)'}, {type(module).__name__}",
            expected="a model of which nothing is compiled, or all by one lpcompile",
            hint=f"restore({whose}) first",
        )


@no_full_collections()
def capture_more(
    model: Model, example_inputs: Sequence[Any] | None = None, example_kwargs: Mapping[str, Any] | None = None
) -> Model:
    """Show a compiled model one more kind of call (no padding, batch 1, another dtype after model.to); returns it.

    What report(model).guard_misses tells of then runs as compiled too. A module keeps at most MAX_VARIANTS kinds of
    call; the clock and what was captured before stay, and so do the stochastic streams, unless the call shows GEMMs
    that none did before; the counts of misses start again. Modules already wrapped (fully_shard) cannot be compiled
    again: show all calls before. If the call raises, or is refused under strict, the model is as before.
    """
    before = get_compiled(model)
    if not before.phase.records:
        raise LpError(
            "this model was compiled from a text, which says what its graphs are",
            where="capture_more",
            hint="lpcompile(model, policy) with these examples, then write the text again",
        )
    root: Any = model
    while find_compiled(root._modules.get("module")) is before:
        root = root._modules["module"]
    args, kwargs = example_call(example_inputs, example_kwargs)
    with recompiling(root) as quantizers:
        if [leaf.name for leaf in find_leaves(root)[0]] != [leaf.name for leaf in before.leaves]:
            raise LpError(
                "the leaves of the model are no longer those that were compiled",
                where="capture_more",
                expected="the modules as lpcompile left them",
                hint="call capture_more before the model is wrapped or sharded",
            )
        calls = before.calls + record_call(root, args, kwargs, before.mode)
        again = _compile(root, before.policy, before.state, calls, before.mode, before.strict)
        install_compiled(root, again, quantizers)
    return model


def _compile(model: nn.Module, policy: Policy, state: RunState, calls: Calls, mode: str, strict: bool) -> Compiled:
    leaves, unreached = find_leaves(model)
    sites = describe(find_sites(leaves, calls), model, calls.reached if calls.num else None)
    phases = [_compile_phase(model, from_step, each, leaves, calls, sites, mode) for from_step, each in policy.phases]
    unreached += _own_functions(calls)
    compiled = Compiled(policy, state, sites, phases, leaves, unreached, calls, mode, strict)
    if strict:
        _refuse_if_not_lowered(compiled)
    return compiled


def _own_functions(calls: Calls) -> list[Unreached]:
    """Modules that call an autograd.Function, such as the linear that ZeRO-3 puts in the place of torch's."""
    found = []
    for path, variants in calls.recordings.items():
        nodes = [node for recording in variants for node in recording.graph.nodes]
        for name in sorted({str(node.target.__name__) for node in nodes if isinstance(node.target, FunctionCall)}):
            found.append(Unreached(path, f"it calls {name}, an autograd.Function, whose products, if any, are its own"))
    return found


def _named_leaves(compiled: Compiled | None) -> list[str]:
    """Leaves that a phase of the policy names."""
    if compiled is None:
        return []
    phases = compiled.phases
    return [leaf.path for leaf in compiled.leaves if any(leaf.name in phase.program.choices for phase in phases)]


def restore(model: nn.Module) -> None:
    """Undo lpcompile: every module gets its own forward back. Does nothing to a model that was not compiled."""
    if find_compiled(model) is None:
        return
    _take_away(model)
    reopen_fast_paths(model)


def advance(model: nn.Module, to_step: int | None = None) -> None:
    """Move schedule, stochastic streams and kept casts on by one optimizer step, or to `to_step` on resuming a run."""
    compiled = get_compiled(model)
    if to_step is not None and to_step < 0:
        raise LpError("not a step", where="advance(to_step=...)", expected="0 or more", got=str(to_step))
    state = compiled.state
    state.step = state.step + 1 if to_step is None else to_step
    state.micro_batch = 0
    state.constants.end_step()
    state.phase = sum(phase.from_step <= state.step for phase in compiled.phases) - 1


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Call advance(model) after every step of `optimizer`, for a training loop of one's own."""
    get_compiled(model)
    hook = AdvanceAfterStep(model)
    if hook not in optimizer._optimizer_step_post_hooks.values():  # a clock goes by one step a step
        optimizer.register_step_post_hook(hook)


@dataclass(frozen=True)
class AdvanceAfterStep:
    """A hook of an optimizer's step."""

    model: nn.Module

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # as a GradScaler tells a fused optimizer to skip
        if found_inf is not None and bool(found_inf):
            return
        if find_compiled(self.model) is not None:  # restore() leaves the optimizer alone
            advance(self.model)


def run_state(model: nn.Module) -> RunState | None:
    """The state that a compiled model's ops share; None if the model was not compiled."""
    compiled = find_compiled(model)
    return compiled.state if compiled else None


def original_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state_dict with the keys of the uncompiled model: what a policy appended under `_lp.` is left out."""
    return {key: value for key, value in model.state_dict().items() if "_lp." not in key}


def check_model(model: nn.Module, policy: Policy) -> tuple[Resolution, list[Finding]]:
    """What a policy means for the leaves of a model, and what of it does not fit them; nothing is run or changed.

    Of a policy with a schedule, ask each phase. How long GRAD's sums are, only a recorded call says.
    """
    leaves, _ = find_leaves(model)
    sites = describe(find_sites(leaves, Calls()), model)
    resolution = policy.resolve(sites)
    program = _named_program(model, policy, leaves, {}, sites, resolution, "train")
    run_passes(program, [ChooseAccumulator()])
    return resolution, program.findings


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
    program = _named_program(model, policy, leaves, calls.recordings, sites, resolution, mode)
    counted = {"lp.quantize": 0}

    def count_casts(done: Pass, program: Program) -> None:
        if done.name == "insert-casts":
            counted["lp.quantize"] = num_op(program, "lp.quantize")

    records = run_passes(program, parse_passes(PIPELINES[mode], PASSES), after_each=count_casts)
    lost = lost_sites(calls)
    for name in program.specs.keys() - program.choices.keys() - program.refusals.keys():
        program.refusals[name] = lost[name][1] if name in lost else "no graph of the model holds this GEMM"
    return PhaseCode(from_step, policy, program, resolution, records, counted["lp.quantize"])


def _named_program(
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


def install_compiled(model: nn.Module, compiled: Compiled, quantizers: dict[str, Learned]) -> None:
    """Give every leaf that a phase names, and every module whose graph a phase changed, its compiled forward; and the
    model its quantizers with state, those of `quantizers` among them.
    """
    modules = dict(model.named_modules())
    for path, parts in groupby(compiled.leaves, key=lambda leaf: leaf.path):
        _install_leaf(modules[path], list(parts), compiled)
    for path, variants in compiled.calls.recordings.items():
        for index, phase in enumerate(compiled.phases):
            units_of_path = [phase.program.units[unit_name(path, number)] for number in range(len(variants))]
            if any(_is_touched(unit) for unit in units_of_path):
                modules[path].__dict__[STATE] = compiled.state
                changed = [
                    Variant.of(_guarded(each, unit, modules[path], phase.program), _noting(unit))
                    for each, unit in zip(variants, units_of_path)
                ]
                install(modules[path], changed, phase=index, clock=compiled.state)

    if _rounds_stochastically(compiled):
        model.register_forward_pre_hook(CountMicroBatches(compiled.state))
    if _keeps_constants(compiled):
        model.register_forward_pre_hook(WatchWeights(compiled.state))
    else:
        compiled.state.constants.why_none = "no pass found one to keep"
    leave_warnings_once_out_of_graphs()
    install_quantizers(model, compiled, quantizers)
    vars(model)[COMPILED] = compiled


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


@dataclass(frozen=True)
class CountMicroBatches:
    """A forward pre-hook of the root, which recomputation never calls: each training forward is one micro-batch."""

    state: RunState

    def __call__(self, model: nn.Module, args: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self.state.micro_batch += 1


@dataclass(frozen=True)
class WatchWeights:
    """A forward pre-hook of the root: casts of weights are kept only where no engine moves the weights about."""

    state: RunState

    def __call__(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.state.constants.watch(model)


def _keeps_constants(compiled: Compiled) -> bool:
    graphs = [graph for phase in compiled.phases for _, graph in phase.program.graphs()]
    return any("lifetime" in node.kwargs for graph in graphs for node in graph.nodes if node.target in OP_OF)


def _rounds_stochastically(compiled: Compiled) -> bool:
    return any(spec.is_stochastic for phase in compiled.phases for spec in phase.program.specs.values())


def _is_touched(unit: Unit) -> bool:
    """A module graph that no pass changed is not installed: the original forward runs its compiled children as well."""
    return any(
        (node.op == "call_function" and node.target in OP_OF) or {*HANDED} & {*node.kwargs} for node in unit.graph.nodes
    )


def _refuse_if_not_lowered(compiled: Compiled) -> None:
    for phase in compiled.phases:
        refusals = [f"{site}: {reason}" for site, reason in phase.program.refusals.items()]
        wrong = [str(finding) for finding in phase.program.findings if finding.is_wrong]
        if refusals or wrong:
            raise LoweringError(
                "; ".join(refusals + wrong),
                where=f"policy {phase.policy.name}, strict",
                expected="every named GEMM to run as its policy says, and a policy that fits the model",
                hint="strict=False, or another rule for these",
            )
