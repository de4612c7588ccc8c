"""`lpcompile opt`: passes over a program, of a file or of a model, and the program as text.

The text goes to stdout or --output; what is told about it (--print-ir-after-all, --stats) goes to stderr, so that
`lpcompile opt a.lpir --passes X | lpcompile opt /dev/stdin --passes Y` works.
"""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lpcompile.errors import LpError
from passes.analysis.traffic import Traffic, traffic
from passes.ir.dot import print_dot
from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.ir.program import Program
from passes.ir.verifier import verify
from passes.manager import Pass, PassRecord, parse_passes, run_passes, split_items
from passes.pipelines import PASSES, PIPELINES


def opt(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE_OR_MODEL",
            help="A file of the text form (FILE.lpir), or a model: gpt, llama, a class of transformers built small from"
            " its config (LlamaForCausalLM), or module:callable, which returns a model or (model, example arguments).",
        ),
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Shipped name or file; for a model only.")] = None,
    passes: Annotated[
        str | None,
        typer.Option(
            help="As a,b{option=1}, or the name of a pipeline. Default: the pipeline of the mode, of a file what it has"
            ' not run yet. "" runs none.'
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(metavar="[train|infer]", help="Which pipeline runs; the graph is that of evaluation.")
    ] = "train",
    joint: Annotated[
        bool,
        typer.Option("--joint", help="Show the joint graphs of a call in training, with FWD, BWD and GRAD in them."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the text here and not to stdout.")
    ] = None,
    print_ir_after_all: Annotated[bool, typer.Option(help="Also print the program after every pass.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Time, nodes, casts and bytes moved, per pass.")] = False,
    dot: Annotated[Path | None, typer.Option(help="Write the graphs as Graphviz text.")] = None,
    verify_only: Annotated[bool, typer.Option("--verify", help="Run no pass; print a verdict.")] = False,
    list_passes: Annotated[bool, typer.Option("--list-passes", help="Which passes and pipelines there are.")] = False,
) -> None:
    """Run passes over a program and print it as text. See docs/ir.md.

    \b
    Examples:
      lpcompile opt --list-passes
      lpcompile opt gpt --policy hfp8 --passes "" -o gpt.lpir
      lpcompile opt gpt.lpir --passes "decompose-attention,decompose-products,annotate,insert-casts" --stats
      lpcompile opt gpt.lpir --passes "train" --print-ir-after-all
      lpcompile opt LlamaForCausalLM --policy fp8-rowwise --dot llama.dot -o llama.lpir
      lpcompile opt my_package.models:tiny --policy my_policy.yaml --mode infer
      lpcompile opt gpt.lpir --verify
      lpcompile opt llama --policy hfp8 --joint
    """
    told = Console(stderr=True, width=_WIDTH)
    if list_passes:
        print("\n".join(describe_passes()))
        return
    if source is None:
        raise LpError("nothing to work on", where="opt", expected="FILE_OR_MODEL", hint="lpcompile opt --help")
    if mode not in PIPELINES:
        raise LpError("not a mode", where="--mode", expected=" or ".join(PIPELINES), got=mode)
    if joint:
        if passes is not None or stats or dot or verify_only:
            expected = "no --passes, --stats, --dot or --verify beside it: the graph is torch.compile's"
            raise LpError("a joint graph has one pass, lower-joint", where="--joint", expected=expected)
        write_text(output, joint_text(source, policy, print_ir_after_all))
        return
    program = read_program(source, policy)
    if verify_only:
        verify(program)
        graphs = sum(1 for _ in program.graphs())
        print(f"{source}: verified, {graphs} graphs, {program.num_nodes()} nodes, {len(program.specs)} sites named")
        return

    moved = [traffic(program)] if stats else []

    def after_each(done: Pass, program: Program) -> None:
        if stats:
            moved.append(traffic(program))
        if print_ir_after_all:
            print(f"// ----- after {done} -----\n{print_program(program)}", file=sys.stderr)

    records = run_passes(program, choose_passes(passes, program, mode), after_each)
    write_text(output, print_program(program))
    if dot:
        write_file(dot, print_dot(program))
    if stats:
        told.print(stats_table(records, moved))


def read_program(source: str, policy: str | None) -> Program:
    """The program of a file, or of a model under a policy before any pass."""
    path = Path(source)
    if source.endswith(".lpir") or path.exists():
        if policy is not None:
            raise LpError("a file has its policy in it", where="--policy", got=policy, hint="a model, or no --policy")
        try:
            return parse_program(path.read_text(), source)
        except OSError as error:
            raise LpError("cannot read the file", where=source, got=error.strerror or str(error)) from error
        except UnicodeDecodeError as error:
            expected, got = "the text form of a program, UTF-8", f"the byte {error.object[error.start]:#04x}"
            raise LpError(
                "not a text", where=source, expected=expected, got=got, hint="lpcompile opt --help"
            ) from error
    policy = _needed(policy, source)
    from launch.commands.example_models import (
        example_model,  # here: transformers and the compiler take seconds to import
    )
    from lpcompile.programs import program_of

    example = example_model(source)
    return program_of(example.model, policy, example.args, example.kwargs)


def joint_text(source: str, policy: str | None, print_before: bool) -> str:
    """The joint graphs of a model after lower-joint; with `print_before` those before it go to stderr."""
    if source.endswith(".lpir") or Path(source).is_file():
        raise LpError("a file has no joint graph", where="--joint", got=source, hint="a model")
    from launch.commands.joint_graph import joint_graphs, print_graphs  # here: the compiler takes seconds to import

    graphs = joint_graphs(source, _needed(policy, source))
    if print_before:
        print(print_graphs([before for before, _ in graphs]), file=sys.stderr)
    return print_graphs([after for _, after in graphs])


def _needed(policy: str | None, source: str) -> str:
    if policy is None:
        raise LpError("a model needs a policy", where=source, expected="--policy NAME_OR_FILE", hint="--policy hfp8")
    return policy


def write_text(output: Path | None, text: str) -> None:
    """To the file, or to stdout."""
    if output:
        write_file(output, text)
    else:
        sys.stdout.write(text)


def write_file(path: Path, text: str) -> None:
    """Raises LpError where it cannot be written."""
    try:
        path.write_text(text)
    except OSError as error:
        raise LpError("cannot write the file", where=str(path), got=error.strerror or str(error)) from error


def choose_passes(text: str | None, program: Program, mode: str = "train") -> list[Pass]:
    """What the user asked for; else of the mode's pipeline what comes after all that has run."""
    if text is not None:
        return parse_passes(PIPELINES.get(text, text), PASSES)
    names = [each.partition("{")[0] for each in program.passes]
    items = split_items(PIPELINES[mode])
    done = [number for number, item in enumerate(items, 1) if item.partition("{")[0] in names]
    return parse_passes(",".join(items[max(done, default=0) :]), PASSES)


def describe_passes() -> list[str]:
    """Each pass with its options and defaults and the first sentence of its file; then the pipelines."""
    lines = []
    for name, kind in PASSES.items():
        options = [f"{field.name}={_default(field)}" for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        lines.append(f"{name}{{{','.join(options)}}}" if options else name)
        lines.append(f"    {_first_sentence(kind)}")
        if kind.requires:
            lines.append(f"    requires: {', '.join(kind.requires)}")
    lines.append("")
    return lines + [f"pipeline {name}: {text}" for name, text in PIPELINES.items()]


def stats_table(records: Sequence[PassRecord], moved: Sequence[Traffic]) -> Table:
    """One row per pass: milliseconds, whether it changed anything, nodes of all graphs before and after, and what one
    forward then does (passes/analysis/traffic.py): casts that run, bytes that casts and what can carry them move.
    `moved`: before the first pass, and after each.
    """
    titles = ("pass", "ms", "changed", "nodes before", "nodes after", "casts", "bytes moved")
    table = Table(*titles, box=None, header_style="bold")
    for each, after in zip(records, moved[1:]):
        changed = "yes" if each.changed else "no"
        nodes = (str(each.nodes_before), str(each.nodes_after))
        table.add_row(each.name, f"{each.seconds * 1e3:.2f}", changed, *nodes, str(after.casts), str(after.bytes))
    if records:
        total = f"{sum(each.seconds for each in records) * 1e3:.2f}"
        nodes = (str(records[0].nodes_before), str(records[-1].nodes_after))
        table.add_row("total", total, "", *nodes, str(moved[-1].casts), str(moved[-1].bytes))
    return table


def _default(field: "dataclasses.Field[object]") -> str:
    default = field.default
    return (
        "?" if default is dataclasses.MISSING else str(default).lower() if isinstance(default, bool) else str(default)
    )


def _first_sentence(kind: type[Pass]) -> str:
    module = inspect.getmodule(kind)
    paragraph = (inspect.getdoc(module) or inspect.getdoc(kind) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).removeprefix(f"{kind.name}: ")


_WIDTH = 1000
"""Columns of what is told: names of passes are not cut where a terminal, or a pipe, is narrower."""
