"""`lpcompile policy`: list the shipped policies, show one, check a file, print the JSON Schema.

Errors are LpError and go up to the command line, which prints them as one sentence.
"""

import json
import warnings
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Column, Table

from lpcompile.errors import LoweringWarning, PolicyError
from lpcompile.policy.file import load_policy, policy_schema, shipped_policies
from lpcompile.policy.resolution import Resolution
from runtime.numerics.specs import ROLES

if TYPE_CHECKING:
    from lpcompile.reporting.certificate import Report

policy_app = typer.Typer(no_args_is_help=True, help="The policy files: which number format each GEMM computes in.")

Source = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped name (see `list`) or a path.")]


@policy_app.command("list", epilog="Example: lpcompile policy list")
def list_policies() -> None:
    """The policies that come with the package."""
    table = Table("name", "hash", "source", box=None, header_style="bold")
    for name in shipped_policies():
        policy = load_policy(name)
        table.add_row(name, policy.hash[:8], escape(policy.source))
    _console().print(table)


@policy_app.command(
    "show", epilog="Examples: lpcompile policy show hfp8  |  lpcompile policy show my.yaml --yaml > full.yaml"
)
def show(
    source: Source,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print it as a file, with everything it extends.")] = False,
) -> None:
    """One policy with everything it extends, in words or as a file."""
    policy = load_policy(source)
    if not as_yaml:
        _say(policy.describe())
    elif _console().is_terminal:
        _console().print(Syntax(policy.to_yaml(), "yaml", background_color="default", word_wrap=True))
    else:
        typer.echo(policy.to_yaml(), nl=False)


@policy_app.command("check", epilog="Example: lpcompile policy check my.yaml --model gpt --strict")
def check(
    source: Source,
    strict: Annotated[
        bool, typer.Option(help="Exit with 1 for a rule that matches or decides nothing, and what else is wrong.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Also compile this model: gpt, llama, a class of transformers, a folder of save_pretrained, or "
            "package.module:callable.",
        ),
    ] = None,
) -> None:
    """Read a policy file; with --model, also say what each GEMM of the model computes in, and which rule decides it.

    Exit code 1: some GEMM does not run as the policy says, or, with --strict, a warning is of something wrong.
    """
    if not check_policy(source, strict=strict, model=model):
        raise typer.Exit(1)


@policy_app.command("schema", epilog="Example: lpcompile policy schema > policy.schema.json")
def schema() -> None:
    """The JSON Schema of a policy file, for completion and checks in an editor."""
    typer.echo(json.dumps(policy_schema(), indent=2))


def check_policy(source: str, strict: bool = False, model: str | None = None) -> bool:
    """Load, and with a model compile it and look at every phase. False where a GEMM does not run as the policy says, or
    under strict where anything else is wrong.
    """
    policy = load_policy(source)
    if model is None and strict:
        raise PolicyError("whether a policy fits depends on the model", where="--strict", hint="--model NAME too")
    _say(f'"{policy.name}" is well formed (rules: {len(policy.rules)}, hash {policy.hash[:16]})')
    if model is None:
        _say("not checked, for lack of --model: whether each rule matches something, and what a model's weights show")
        return True
    from launch.commands.example_models import example_model  # here: torch and the compiler, which `list` needs not
    from lpcompile import advance, lpcompile, report
    from lpcompile.compiled import get_compiled
    from lpcompile.reporting.trouble import trouble_of

    built = example_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoweringWarning)  # told below, of every phase
        compiled = lpcompile(built.model, policy.over(_STEPS), built.args, built.kwargs)
    is_fit = True
    plan = get_compiled(compiled)
    for code in plan.phases:
        compiled.train(code.from_step is not None)
        if code.from_step is not None:
            advance(compiled, to_step=code.from_step)
        found = report(compiled)
        when = "in evaluation mode" if code.from_step is None else f"from step {code.from_step}"
        _say(f"{when}: {code.policy.name}")
        _print_rows(found)
        _print_rules(code.resolution)
        refused = [row for row in found.gemms if not row.runs_as_policy_says]
        wrong = [finding for finding in code.program.findings if finding.is_wrong]
        for row in refused:
            _say(f"does not run as the policy says: {row.name} {row.role}: {row.reason}")
        for finding in code.program.findings:
            _say(f"warning: {finding}")
        if trouble := trouble_of(found):
            _say(trouble)
        is_fit = is_fit and not refused and not (strict and wrong)
    return is_fit


_STEPS = 100
"""Of the run that a share in the schedule is a share of: the step is then its per cent."""


def _print_rows(found: "Report") -> None:
    name_column = Column("GEMM", no_wrap=True)  # cut to a narrow terminal, c_attn and c_proj would read alike
    table = Table(name_column, "role", "computes in", "runs", "decided by", box=None, header_style="bold")
    for row in found.gemms:
        numbers = f"{row.lhs} * {row.rhs} -> {row.accumulate} -> {row.out}"
        name = escape(row.name) if row.role == ROLES[0] else ""
        table.add_row(name, row.role, numbers, row.fidelity, escape(row.rule))
    for left in found.left_alone:
        table.add_row(escape(left), "", "left alone", "", "")
    _console().print(table)


def _print_rules(resolution: Resolution) -> None:
    """How many GEMMs each rule matches, and how many rows of the table it decides."""
    table = Table("rule", "matches", "GEMMs", "rows", box=None, header_style="bold")
    for use in resolution.rules:
        table.add_row(escape(use.label), escape(use.condition), str(len(use.sites)), str(use.num_rows))
    _console().print(table)


def _console() -> Console:
    """Made per call, so that output goes to the stdout of now."""
    return Console(soft_wrap=True, highlight=False)


def _say(text: str) -> None:
    _console().print(text, markup=False)
