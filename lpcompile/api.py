"""lpcompile(model, policy): compile a model in place under a policy; advance its clock; find its state.

policy -> phases -> per phase: what runs each product -> installed as the forward of the same instances
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from lpcompile.collector import no_full_collections
from lpcompile.compiled import (
    COMPILED,
    Compiled,
    compiled_parts,
    end_joint,
    find_compiled,
    get_compiled,
    root_below_engines,
)
from lpcompile.errors import LoweringError, LpError
from lpcompile.frontends.fast_paths import close_fast_paths, reopen_fast_paths
from lpcompile.frontends.install import RECORD, install, uninstall
from lpcompile.frontends.intercept.install import find_writers, install_scopes, nameable, possible_sites
from lpcompile.frontends.intercept.look import Seen, look_at
from lpcompile.frontends.joint.warnings_once import leave_warnings_once_out_of_graphs
from lpcompile.frontends.leaves.find import Leaf, find_leaves, leaf_forward
from lpcompile.frontends.leaves.leaf_forward import LeafForward, is_kept_weight, leaf_products
from lpcompile.plan import PhaseCode, Sight, count_casts, expecting
from lpcompile.policy.file import load_policy
from lpcompile.policy.resolve import Policy
from lpcompile.quantizers import install_quantizers, leave_out_of_ddp, take_quantizers
from lpcompile.reporting.changes import RefuseChanges
from lpcompile.reporting.checks import check_policy
from lpcompile.reporting.trouble import tell_trouble
from passes.ir.program import STATE
from runtime.ops.dialect import OP_OF
from runtime.quantize.observed.end_step import drop_seen, end_step
from runtime.quantize.stateful import Stateful
from runtime.quantize.store import STORE as QUANTIZERS
from runtime.quantize.store import find_store
from runtime.recomputation import is_recomputing
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
    GEMM-bearing modules are always reached, and so are products that a module writes as operations, each as it runs.
    With example inputs a copy of the model is called, in training and in evaluation mode, so that the report and the
    rules know those before; without them they are found as they run.

    mode="infer" is for evaluation under torch.no_grad(): batch norms, sums and activations go into the product next to
    them, and graphs keep nothing that only a gradient needs. With gradients, or hooks, the original forward runs; of a
    graph that only has batch norms folded, with gradients, the graph, within a few ulp of the original.

    What does not run as the policy says is told by one LoweringWarning, and in full by report(model). strict=True
    raises LoweringError if a named GEMM does not run as its policy says or a check (lpcompile/reporting/checks.py)
    finds something wrong. seed keys stochastic rounding. Compiling a compiled model replaces what was there; whatever
    raises leaves the model as it was. A part of a compiled model, and a model with a compiled part, are refused.
    """
    loaded = load_policy(policy)
    if not isinstance(model, nn.Module):
        raise LpError("not a model", expected="a torch.nn.Module", got=type(model).__name__)
    if mode not in ("train", "infer"):
        raise LpError("not a mode", where="lpcompile(mode=...)", expected="train or infer", got=repr(mode))
    args, kwargs = example_call(example_inputs, example_kwargs)
    with recompiling(model) as quantizers:
        captured = example_inputs is not None or example_kwargs is not None
        call = (args, kwargs) if captured else None
        state = RunState(seed=seed, watch_overflow=loaded.loss_scale.kind != "none", strict=strict)
        _compile_products(model, loaded, state, call, mode, strict, quantizers)
    tell_trouble(model, stacklevel=3)
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
def recompiling(model: nn.Module) -> Iterator[dict[str, Stateful]]:
    """The model without what an earlier compilation installed, to be compiled anew; if that fails, with it again. Gives
    the quantizers with state that it had.
    """
    root = root_below_engines(model)
    before = None if root is None else vars(root)[COMPILED]
    _refuse_parts(model, before)
    held = [(module, type(module), _installed(module)) for module in model.modules()]
    hooks = [(module, dict(module._forward_pre_hooks)) for module in model.modules() if COMPILED in vars(module)]
    store, quantizers = find_store(model), _take_away(model)
    close_fast_paths(model)
    try:
        yield quantizers
        end_joint(model, before)
    except BaseException:
        _take_away(model)
        for module, kind, values in held:
            if RECORD in values:
                install(module, values[RECORD])  # also under a forward of the instance
            module.__class__ = kind
            vars(module).update(values)
        for module, by_key in hooks:
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(by_key)
        if store is not None:
            model.add_module(QUANTIZERS, store)
            leave_out_of_ddp(model)
        raise
    finally:
        reopen_fast_paths(model, compiled=_named_leaves(find_compiled(model)))


def _installed(module: nn.Module) -> dict[str, Any]:
    """What of a module's __dict__ is lpcompile's."""
    return {name: vars(module)[name] for name in (RECORD, STATE, COMPILED) if name in vars(module)}


def _take_away(model: nn.Module) -> dict[str, Stateful]:
    """Give every module its own forward back; the quantizers with state that the model had."""
    for module in model.modules():
        uninstall(module)
        hooks = module._forward_pre_hooks
        for key in [
            key for key, hook in hooks.items() if isinstance(hook, CountMicroBatches | WatchWeights | RefuseChanges)
        ]:
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


def _compile_products(
    model: nn.Module,
    policy: Policy,
    state: RunState,
    call: tuple[tuple[Any, ...], dict[str, Any]] | None,
    mode: str,
    strict: bool,
    quantizers: dict[str, Stateful],
) -> None:
    leaves, unreached = find_leaves(model)
    writers = find_writers(model, leaves)
    seen = None if call is None else look_at(model, *call, leaves, writers)
    parameter = next(model.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    phases = [PhaseCode.of(from_step, each, device) for from_step, each in policy.phases]
    if (evaluation := policy.evaluation) is not None:
        state.evaluation = len(phases)
        phases.append(PhaseCode.of(None, evaluation, device))
    unreached |= seen.asides if seen else {}
    called = None if seen is None else frozenset(seen.calls)
    compiled = Compiled(policy, state, [], phases, leaves, unreached, mode, strict, called)
    sights = [sight_of(model, leaf, seen) for leaf in leaves]
    compiled.add_all(model, [*sights, *(seen.functional_sights() if seen else ())])
    modules = dict(model.named_modules())
    unseen = {path: modules[path] for path in writers if seen is None or path not in seen.calls}
    possible = possible_sites(unseen, compiled.num_layers)
    for phase in phases:
        phase.resolution = expecting(phase.policy, phase.resolution, possible)
        phase.program.findings[:0] = check_policy(model, leaves, compiled.sites, phase.policy, phase.resolution)
        phase.num_quantize_before, phase.num_quantize_after = count_casts(phase, seen.operands if seen else {})
    if mode == "infer" and call is not None and seen is not None:
        from lpcompile.frontends.export.whole_graph import compile_exported, install_exported  # and torch's compiler

        exported = compile_exported(model, compiled, seen.ran, call)
    else:
        exported = None
    _refuse_if_not_lowered(compiled, modules)
    install_products(model, compiled, writers, seen, quantizers)
    if exported is not None and call is not None:
        install_exported(model, compiled, exported, call)


def install_products(
    model: nn.Module,
    compiled: Compiled,
    writers: Sequence[str],
    seen: Seen | None,
    quantizers: dict[str, Stateful],
) -> None:
    """Let every leaf that a phase names, and what modules write as operations, run what was planned."""
    has_scopes = install_scopes(model, compiled, writers, seen)
    modules = dict(model.named_modules())
    for path, group in groupby(compiled.leaves, key=lambda leaf: leaf.path):
        parts = list(group)
        products = [leaf_products(parts, phase.products) for phase in compiled.phases]
        if has_scopes or any(each is not None for each in products):
            install(modules[path], LeafForward(leaf_forward(modules[path]), products, compiled.state))
            modules[path].__dict__[STATE] = compiled.state
    keeps = any(is_kept_weight(product) for phase in compiled.phases for product in phase.products.values())
    finish_install(model, compiled, keeps or has_scopes or keeps_casts(compiled), quantizers)


def sight_of(model: nn.Module, leaf: Leaf, seen: Seen | None) -> Sight:
    """What the plan asks of a leaf."""
    weight = model.get_submodule(leaf.path)._parameters.get("weight")
    reason = ""
    if type(weight) is nn.Parameter and not leaf.part and not weight.is_floating_point():
        reason = f"an operand is {weight.dtype}, and only real numbers are cast"
    lengths = dict(seen.lengths.get(leaf.name, {})) if seen else {}
    is_repeated = leaf.is_repeated or (seen is not None and seen.is_repeated(leaf.path))
    if leaf.k is not None and leaf.n is not None:
        lengths = {"fwd": leaf.k, "bwd": leaf.n, **lengths}
    if is_repeated:
        lengths.pop("grad", None)
    sizes = leaf.n, leaf.k
    return Sight(leaf.name, leaf.op, leaf.kind, *sizes, lengths, leaf.index, reason)


def keeps_casts(compiled: Compiled) -> bool:
    """Whether a graph keeps casts of weights."""
    graphs = [graph for phase in compiled.phases for _, graph in phase.program.graphs()]
    return any("lifetime" in node.kwargs for graph in graphs for node in graph.nodes if node.target in OP_OF)


def finish_install(model: nn.Module, compiled: Compiled, keeps_casts: bool, quantizers: dict[str, Stateful]) -> None:
    """The hooks of the root, the quantizers with state, those of `quantizers` among them, and the record."""
    if _rounds_stochastically(compiled):
        model.register_forward_pre_hook(CountMicroBatches(compiled.state))
    if keeps_casts:
        model.register_forward_pre_hook(WatchWeights(compiled.state))
    else:
        compiled.state.constants.why_none = "no pass found one to keep"
    if compiled.strict:
        model.register_forward_pre_hook(RefuseChanges())
    leave_warnings_once_out_of_graphs()
    install_quantizers(model, compiled, quantizers)
    vars(model)[COMPILED] = compiled


def _named_leaves(compiled: Compiled | None) -> list[str]:
    """Leaves that a phase of the policy names."""
    if compiled is None:
        return []
    phases = compiled.phases
    return [leaf.path for leaf in compiled.leaves if any(leaf.name in phase.program.choices for phase in phases)]


def restore(model: nn.Module) -> None:
    """Undo lpcompile: every module gets its own forward back. Does nothing to a model that was not compiled."""
    for _, root in compiled_parts(model):
        end_joint(root, vars(root)[COMPILED])
        _take_away(root)
        reopen_fast_paths(root)


def advance(
    model: nn.Module, to_step: int | None = None, *, skipped: bool = False, group: dist.ProcessGroup | None = None
) -> None:
    """Move schedule, stochastic streams, kept casts and delayed scales on by one optimizer step, or to `to_step` on
    resuming a run. skipped: the step changed no weight, and so moves none of these.

    With torch.distributed and scales that follow earlier steps all ranks of `group`, the data-parallel ones (None: all
    there are), call it together: it has one all-reduce of a number for each such operand.
    """
    compiled = get_compiled(model)
    if to_step is not None and to_step < 0:
        raise LpError("not a step", where="advance(to_step=...)", expected="0 or more", got=str(to_step))
    state = compiled.state
    if skipped or to_step is not None:
        drop_seen(state.quantizers)
    else:
        end_step(state.quantizers, compiled.strict, group)
    state.step = state.step + (not skipped) if to_step is None else to_step
    state.micro_batch = 0
    state.constants.end_step()
    starts = [phase.from_step for phase in compiled.phases if phase.from_step is not None]
    state.phase = sum(start <= state.step for start in starts) - 1


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None) -> None:
    """Call advance(model) after every step of `optimizer`, for a training loop of one's own. Of several optimizers of
    one model, each attached, the steps that follow one another are one step; one that a scaler skips is none. `group`
    as advance takes it.
    """
    get_compiled(model)
    hook = AdvanceAfterStep(model, group)
    if hook not in optimizer._optimizer_step_post_hooks.values():  # a clock goes by one step a step
        optimizer.register_step_post_hook(hook)


@dataclass(frozen=True)
class AdvanceAfterStep:
    """A hook of an optimizer's step."""

    model: nn.Module
    group: dist.ProcessGroup | None = None

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # as a GradScaler tells a fused optimizer to skip
        if found_inf is not None and bool(found_inf):
            return
        compiled = find_compiled(self.model)  # restore() leaves the optimizer alone
        if compiled is not None and compiled.state.stepped.begins_step(optimizer):
            advance(self.model, group=self.group)


def run_state(model: nn.Module) -> RunState | None:
    """The state that a compiled model's ops share; None if the model was not compiled."""
    compiled = find_compiled(model)
    return compiled.state if compiled else None


def original_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state_dict with the keys of the uncompiled model: what a policy appended under `_lp.` is left out."""
    return {key: value for key, value in model.state_dict().items() if "_lp." not in key}


@dataclass(frozen=True)
class CountMicroBatches:
    """A forward pre-hook of the root: each forward with gradients is a micro-batch. Calls that do not come by the root,
    and forwards without gradients, are told apart by their sites, which count their calls.
    """

    state: RunState

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and (torch.compiler.is_compiling() or not is_recomputing()):
            self.state.micro_batch += 1
            if torch.compiler.is_compiling():
                self.state.move_in_trace()


@dataclass(frozen=True)
class WatchWeights:
    """A forward pre-hook of the root: casts of weights are kept only where no engine moves the weights about."""

    state: RunState

    def __call__(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.state.constants.watch(model)


def _rounds_stochastically(compiled: Compiled) -> bool:
    return any(spec.is_stochastic for phase in compiled.phases for spec in phase.program.specs.values())


def _refuse_if_not_lowered(compiled: Compiled, modules: Mapping[str, nn.Module]) -> None:
    if not compiled.strict:
        return
    unreached = {path: modules[path] for path in compiled.unreached}
    for phase in compiled.phases:
        named = nameable(phase.policy, unreached, compiled.num_layers)
        refusals = [f"{site}: {reason}" for site, reason in phase.program.reasons()]
        refusals += [f"{path or '(root)'}: {compiled.unreached[path]}" for path in sorted(named)]
        wrong = [str(finding) for finding in phase.program.findings if finding.is_wrong]
        if refusals or wrong:
            raise LoweringError(
                "; ".join(refusals + wrong),
                where=f"policy {phase.policy.name}, strict",
                expected="every named GEMM to run as its policy says, and a policy that fits the model",
                hint="strict=False, or another rule for these",
            )
