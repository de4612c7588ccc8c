"""Reproduce: the command line of launch/reproduction/."""

from pathlib import Path
from typing import Annotated

import typer

from launch.reproduction.experiment import Form
from launch.training.config import ConfigError


def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Which; omitted: all.", metavar="NAME...")] = None,
    full: Annotated[bool, typer.Option("--full", help="Ten seeds and long sums; hours.")] = False,
    short: Annotated[bool, typer.Option("--short", help="A few minutes on 2 cores (default).")] = False,
    smallest: Annotated[bool, typer.Option("--smallest", help="Seconds: to see that it runs.")] = False,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Results, one file a run: a rerun goes on from them.")
    ] = Path("runs/reproduction"),
    docs: Annotated[
        Path | None,
        typer.Option(
            "--docs",
            metavar="DIR",
            help="Where reproduction.md and its plots are written; omitted: docs with --full, else beside the results.",
        ),
    ] = None,
    page_only: Annotated[bool, typer.Option("--page-only", help="Only write the page of what is there.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Only say which there are.")] = False,
) -> None:
    """Run published claims about low-precision training again, and write tables and plots beside their numbers.

    Stopped at any time, it goes on from the last finished run.

    \b
    Examples:
      lpcompile reproduce --list
      lpcompile reproduce swamping fqt --short
      lpcompile reproduce --full --out runs/reproduction --docs docs
      lpcompile reproduce accuracy --full --page-only
    """
    from launch.reproduction.registry import EXPERIMENTS, experiment

    if list_only:
        for name, what in EXPERIMENTS.items():
            print(f"{name:20} {what}")
        return
    if full + short + smallest > 1:
        raise ConfigError("one form at a time", where="reproduce", expected="--full, --short or --smallest")
    for name in names or ():
        experiment(name)
    from launch.reproduction.runner import reproduce as run  # here: it imports torch

    form: Form = "full" if full else "smallest" if smallest else "short"
    run(names or [], form, out, docs or (Path("docs") if full else out / form), page_only)
