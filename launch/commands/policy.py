"""`lpcompile policy`: list the shipped policies, show one, check a file, print the JSON Schema.

Errors are LpError and go up to the command line, which prints them as one sentence.
"""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Column, Table

from launch.training.models import model_for_check
from lpcompile.api import check_model
from lpcompile.errors import PolicyError
from lpcompile.policy.file import load_policy, policy_schema, shipped_policies
from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from runtime.numerics.specs import ROLES

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
    strict: Annotated[bool, typer.Option(help="What is wrong is an error: a rule that matches nothing, say.")] = False,
    model: Annotated[str | None, typer.Option(help="Also resolve the policy for the GEMMs of this model.")] = None,
) -> None:
    """Read a policy file; with --model, also say what each GEMM of the model would compute in."""
    check_policy(source, strict=strict, model=model)


@policy_app.command("schema", epilog="Example: lpcompile policy schema > policy.schema.json")
def schema() -> None:
    """The JSON Schema of a policy file, for completion and checks in an editor."""
    typer.echo(json.dumps(policy_schema(), indent=2))


def check_policy(source: str, strict: bool = False, model: str | None = None) -> None:
    """Load, and with a model resolve and check every phase: what is wrong is told, and an error under strict."""
    policy = load_policy(source)
    if model is None and strict:
        raise PolicyError("whether a policy fits depends on the model", where="--strict", hint="--model NAME too")
    _say(f'"{policy.name}" is well formed (rules: {len(policy.rules)}, hash {policy.hash[:16]})')
    if model is None:
        _say("not checked, for lack of --model: whether each rule matches something, and what a model's weights show")
        return
    built = model_for_check(model)
    for step, phase in policy.phases:
        resolution, findings = check_model(built, phase)
        _print_resolution(phase, step, resolution)
        wrong = [str(finding) for finding in findings if finding.is_wrong]
        if strict and wrong:
            raise PolicyError("; ".join(wrong), hint="another rule, or no --strict")
        for finding in findings:
            _say(f"warning: {finding}")


def _print_resolution(policy: Policy, step: int, resolution: Resolution) -> None:
    name_column = Column("GEMM", no_wrap=True)  # cut to a narrow terminal, c_attn and c_proj would read alike
    table = Table(name_column, "role", "computes in", "decided by", box=None, header_style="bold")
    for name, spec in resolution.specs.items():
        if spec is None:
            table.add_row(escape(name), "", "left alone", "no rule")
            continue
        for role in ROLES:
            rule = resolution.rule_of[name].get(role, "no rule")
            table.add_row(escape(name) if role == ROLES[0] else "", role, str(spec.role(role)), escape(rule))
    _say(f"from step {step}: {policy.name}")
    _console().print(table)


def _console() -> Console:
    """Made per call, so that output goes to the stdout of now."""
    return Console(soft_wrap=True, highlight=False)


def _say(text: str) -> None:
    _console().print(text, markup=False)
