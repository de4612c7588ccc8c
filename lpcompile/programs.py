"""Programs: a model as the program that passes work on, and the program of a text as what a model runs.

    program_of(model, "hfp8", ...)          what lpcompile() starts from, before any pass
    install_text(model, text, ...)          what lpcompile() ends with, from a file instead of a policy

A text holds graphs and no guards: when a module's graph holds is learned again from the example inputs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from lpcompile.api import example_call, finish_install, recompiling, restore
from lpcompile.capture.calls import Calls, record_call
from lpcompile.capture.recorded_sites import build_program, find_sites, note_repeated
from lpcompile.capture.whole_graphs import facts_of, install_recorded, keeps_constants
from lpcompile.compiled import Compiled
from lpcompile.errors import LpError, nearest_names
from lpcompile.frontends.fast_paths import close_fast_paths, reopen_fast_paths
from lpcompile.frontends.leaves.find import Leaf, find_leaves
from lpcompile.plan import PhaseCode
from lpcompile.policy.describe import describe
from lpcompile.policy.file import load_policy
from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from passes.ir.parser import parse_program
from passes.ir.program import STATE, Program, Unit, child_path, num_op
from runtime.ops.dialect import OP_OF
from runtime.state import RunState

Model = TypeVar("Model", bound=nn.Module)


def program_of(
    model: nn.Module,
    policy: str | Path | Policy,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    mode: Literal["train", "infer"] = "train",
    phase: int = 0,
) -> Program:
    """Every graph of the model and what the policy's phase says of its sites; the model itself is left as it is."""
    policy = load_policy(policy).phases[phase][1]
    restore(model)
    close_fast_paths(model)
    try:
        calls = _calls(model, example_inputs, example_kwargs, mode)
    finally:
        reopen_fast_paths(model)
    leaves, _ = find_leaves(model)
    program = build_program(model, leaves, calls.recordings, mode)
    specs = policy.resolve(describe(find_sites(leaves, calls), model, calls.reached if calls.num else None)).specs
    program.specs = {name: spec for name, spec in specs.items() if spec is not None}
    note_repeated(model, leaves, program)
    return program


def install_text(
    model: Model,
    text: str,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    mode: Literal["train", "infer"] = "train",
    seed: int = 0,
    file: str = "<text>",
) -> Model:
    """Let the graphs of a text be what `model` runs, in place; returns it, compiled as by lpcompile().

    The passes up to select-kernels must have run on the text. Example inputs are needed where a module's graph, and not
    only those of leaves, holds lp ops; they are those that the text was made with. Raises ParseError, or LpError where
    the text is not of this model.
    """
    program = parse_program(text, file)
    with recompiling(model) as quantizers:
        leaves, unreached = find_leaves(model)
        calls = _calls(model, example_inputs, example_kwargs, mode)
        _check_fits(program, build_program(model, leaves, calls.recordings, mode), file)
        _check_names(program, dict(model.named_modules()), leaves, file)
        policy, state, sites = Policy(name=file), RunState(seed=seed), find_sites(leaves, calls)
        resolution = Resolution({**program.specs}, {}, [])
        casts = num_op(program, "lp.quantize")
        phase = PhaseCode(0, policy, program, resolution, [], casts, casts)
        compiled = Compiled(policy, state, sites, [phase], leaves, unreached, mode, False, *facts_of(calls))
        install_recorded(model, compiled, calls)
        finish_install(model, compiled, keeps_constants(compiled), quantizers)
    return model


def _calls(
    model: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, mode: Literal["train", "infer"]
) -> Calls:
    if args is None and kwargs is None:
        return Calls()
    return record_call(model, *example_call(args, kwargs), mode)


def _check_names(program: Program, modules: Mapping[str, nn.Module], leaves: Sequence[Leaf], file: str) -> None:
    """Every module that a graph is of or calls, and every attribute that it reads, is there."""
    paths = {leaf.name: leaf.path for leaf in leaves}  # a product of a composite leaf is no module
    for name, unit in program.units.items():
        owner = modules.get(paths.get(unit.path, unit.path))
        if owner is None:
            what, hint = f'the model has no module "{unit.path}"', nearest_names(unit.path, [*modules][1:])
            raise LpError(what, where=f"{file}: {name}", hint=hint)
        for node in (*unit.graph.nodes, *(unit.fed.nodes if unit.fed else ())):
            target = str(node.target)
            if node.op == "call_module" and child_path(unit.path, node) not in modules:
                kind, known = "child", [path for path, _ in owner.named_modules()][1:]
            elif node.op == "get_attr" and target != STATE and not _has_attribute(owner, target):
                kind, known = "attribute", [path for path, _ in (*owner.named_parameters(), *owner.named_buffers())]
            else:
                continue
            what, hint = f'{type(owner).__name__} has no {kind} "{target}"', nearest_names(target, known)
            raise LpError(what, where=f"{file}: {name}: %{node.name}", hint=hint)


def _has_attribute(module: nn.Module, target: str) -> bool:
    """A parameter, a buffer, what the class or the instance has; a property is not computed."""
    *children, name = target.split(".")
    for child in children:
        if child not in module._modules:
            return False
        module = module._modules[child]  # type: ignore[assignment]
    return name in (*module._parameters, *module._buffers, *vars(module)) or hasattr(type(module), name)


def _check_fits(program: Program, own: Program, file: str) -> None:
    """Every graph of the text that lp ops are in stands for a graph of the model with the same inputs."""
    for name, unit in program.units.items():
        is_touched = any(node.op == "call_function" and node.target in OP_OF for node in unit.graph.nodes)
        if name not in own.units and is_touched:
            hints = {"module": "the example inputs that the text was made with", "leaf": "the model of the text"}
            raise LpError(f'the model has no graph "{name}"', where=file, hint=hints[unit.kind])
        if name in own.units:
            wanted, got = _inputs(own.units[name]), _inputs(unit)
            if wanted != got:
                what = f'the graph "{name}" takes other inputs than the model\'s'
                raise LpError(what, where=file, expected=", ".join(wanted), got=", ".join(got))
    missing = [name for name in own.units if name not in program.units]
    if missing:
        raise LpError("the text has no graph for a module", where=file, expected=", ".join(missing))


def _inputs(unit: Unit) -> list[str]:
    return [str(node.target) for node in unit.graph.find_nodes(op="placeholder")]
