"""Programs: a model as the program that passes work on, and the program of a text as what a model runs.

    program_of(model, "hfp8", ...)          what lpcompile(mode="infer") starts from, before any pass
    install_text(model, text, ...)          what it ends with, from a file instead of a policy

A text holds the graph of the whole model; which calls that stands for is learned again from the example inputs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lpcompile.api import example_call, install_products, recompiling, restore, sight_of
from lpcompile.compiled import Compiled
from lpcompile.errors import LpError, nearest_names
from lpcompile.frontends.export.whole_graph import ROOT, Call, exported_call, install_exported, sights_of
from lpcompile.frontends.fast_paths import close_fast_paths, reopen_fast_paths
from lpcompile.frontends.intercept.install import find_writers
from lpcompile.frontends.leaves.find import Leaf, find_leaves, is_composite, leaf_graph
from lpcompile.plan import PhaseCode, Sight, number_sites
from lpcompile.policy.describe import describe
from lpcompile.policy.file import load_policy
from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from passes.ir.gemm_nodes import read_gemm
from passes.ir.parser import parse_program
from passes.ir.program import SITE, STATE, Program, Unit, num_op
from runtime.state import RunState

Model = TypeVar("Model", bound=nn.Module)


def program_of(
    model: nn.Module,
    policy: str | Path | Policy,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    phase: int = 0,
) -> Program:
    """The graph of the model in evaluation mode, or without example inputs a graph of each leaf, and what the policy
    says of its sites in evaluation, or in a phase; the model itself is left as it is. Raises NotSupported where it has
    no such graph.
    """
    policy = load_policy(policy)
    policy = policy.evaluation or policy.phases[phase][1]
    restore(model)
    leaves, _ = find_leaves(model)
    call, shown = _call(example_inputs, example_kwargs), []
    if call is None:
        units = {
            leaf.path: _leaf_unit(leaf.path, model.get_submodule(leaf.path))
            for leaf in leaves
            if not is_composite(model.get_submodule(leaf.path))
        }
    else:
        close_fast_paths(model)
        try:
            exported = exported_call(model, leaves, call)
        finally:
            reopen_fast_paths(model)
        units, shown = {ROOT: Unit("", exported.graph, "module")}, sights_of(exported)
    parameter = next(model.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    plan = Compiled(policy, RunState(), [], [PhaseCode.of(0, policy, device)], leaves, {}, "infer", False)
    plan.add_all(model, _all_sights(model, leaves, shown))
    known = plan.phases[0].program
    return Program(units, known.specs, device=device, decisions=known.decisions, findings=known.findings)


def _all_sights(model: nn.Module, leaves: Sequence[Leaf], shown: Sequence[Sight]) -> list[Sight]:
    own = {leaf.name: sight_of(model, leaf, None) for leaf in leaves}
    return [*own.values(), *(sight for sight in {each.name: each for each in shown}.values() if sight.name not in own)]


def install_text(
    model: Model,
    text: str,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    file: str = "<text>",
) -> Model:
    """Let the graph of a text be what `model` runs in evaluation mode without gradients, in place; returns it, compiled
    as by lpcompile(). Every other call runs its products as the text says of their sites.

    The passes up to select-kernels must have run on the text. The example inputs are those that it was made with.
    Raises ParseError, or LpError where the text is not of this model.
    """
    program, call = parse_program(text, file), _call(example_inputs, example_kwargs)
    if call is None:
        what = "which calls the graph of a text stands for is learned from an example"
        raise LpError(what, where=file, hint="the example inputs that the text was made with")
    if ROOT not in program.units or (program.specs and not program.choices and not program.refusals):
        what = "no graph of a whole model on which passes have run"
        raise LpError(what, where=file, hint="lpcompile opt MODEL --policy NAME -o FILE.lpir")
    with recompiling(model) as quantizers:
        leaves, unreached = find_leaves(model)
        exported = exported_call(model, leaves, call)
        _check_fits(program.units[ROOT], Unit("", exported.graph, "module"), file)
        _check_names(program.units[ROOT], model, file)
        sights, casts = _all_sights(model, leaves, sights_of(exported)), num_op(program, "lp.quantize")
        resolution = Resolution({**{each.name: None for each in sights}, **program.specs}, {})
        phase = PhaseCode(0, Policy(name=Path(file).name[-100:]), program, resolution, [], casts, casts)
        sites = [Site(each.name, each.op, each.index, len(leaves), each.n, each.k) for each in sights]
        state, called = RunState(seed=seed), frozenset(leaf.path for leaf in leaves)
        compiled = Compiled(
            phase.policy, state, describe(sites, model), [phase], leaves, unreached, "infer", False, called
        )
        compiled.numbers = number_sites([*program.specs])
        phase.place(sights, program.specs, state, compiled.numbers)
        install_products(model, compiled, find_writers(model, leaves), None, quantizers)
        install_exported(model, compiled, exported, call)
    return model


def _leaf_unit(path: str, module: nn.Module) -> Unit:
    unit = Unit(path, leaf_graph(module), "leaf")
    for node in unit.graph.nodes:
        if read_gemm(node) is not None:
            node.meta[SITE] = path
    return unit


def _call(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> Call | None:
    return None if args is None and kwargs is None else example_call(args, kwargs)


def _check_names(unit: Unit, model: nn.Module, file: str) -> None:
    """Every module that the graph calls, and every attribute that it reads, is there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in unit.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target not in modules:
            kind, known = "child", [*modules][1:]
        elif node.op == "get_attr" and target != STATE and not _has_attribute(model, target):
            kind, known = "attribute", [path for path, _ in (*model.named_parameters(), *model.named_buffers())]
        else:
            continue
        what, hint = f'{type(model).__name__} has no {kind} "{target}"', nearest_names(target, known)
        raise LpError(what, where=f"{file}: %{node.name}", hint=hint)


def _has_attribute(module: nn.Module, target: str) -> bool:
    """A parameter, a buffer, what the class or the instance has; a property is not computed."""
    *children, name = target.split(".")
    for child in children:
        if child not in module._modules:
            return False
        module = module._modules[child]  # type: ignore[assignment]
    return name in (*module._parameters, *module._buffers, *vars(module)) or hasattr(type(module), name)


def _check_fits(unit: Unit, own: Unit, file: str) -> None:
    """The graph of the text takes and gives what the model's does."""
    wanted, got = _inputs(own), _inputs(unit)
    if wanted != got:
        what = "its graph takes other inputs than the model"
        raise LpError(what, where=file, expected=", ".join(wanted), got=", ".join(got))
    wanted_results, results = (len(each.graph.output_node().args[0]) for each in (own, unit))  # type: ignore[arg-type]
    if wanted_results != results:
        what = "its graph gives another number of results than the model"
        raise LpError(what, where=file, expected=str(wanted_results), got=str(results))


def _inputs(unit: Unit) -> list[str]:
    return [str(node.target) for node in unit.graph.find_nodes(op="placeholder")]
