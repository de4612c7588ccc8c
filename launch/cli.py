"""The command line: `lpcompile VERB` = `python -m launch VERB`.

A user's mistake is one sentence on stderr and exit code 2, under torchrun from rank 0 only.
"""

import inspect
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from launch.commands.bench import find_benchmarks, run_benchmarks
from launch.training.config import RunConfig, Whole, flag_of, load_config
from launch.training.last_words import WorkerError, leave_last_words
from launch.training.record import find_checkpoint, read_record
from runtime.errors import LpError, NotSupported

# Verbs whose files are imported where they are asked for: (module, its Typer or function, what `--help` says of it).
_APART = {
    "policy": (
        "launch.commands.policy", "policy_app", "The policy files: which number format each GEMM computes in."
    ),
    "inspect": (
        "launch.commands.inspect", "inspect_app", "Number formats: what there is, and what a number becomes."
    ),
    "reproduce": (
        "launch.commands.reproduce", "reproduce",
        "Run published claims about low-precision training again, and write tables and plots beside their numbers.",
    ),
    "opt": ("launch.commands.opt", "opt", "Run passes over a program and print it as text. See docs/ir.md."),
}  # fmt: skip

# Verbs of the design that this version does not have.
_PLANNED = {
    "quantize": "calibrate and quantize a trained model",
    "search": "find a policy under a budget",
    "export": "write a quantized model for another runtime",
}

_OTHER_NAMES = {
    "--learning-rate": "--lr", "--seq-len": "--context", "--sequence-length": "--context", "--block-size": "--context",
    "--max-steps": "--steps", "--iters": "--steps", "--batch-size": "--batch", "--hidden-size": "--width",
    "--num-layers": "--layers", "--num-heads": "--heads", "--output-dir": "--out", "--dataset": "--data",
    "--gradient-accumulation-steps": "--grad-accumulation", "--warmup-steps": "--warmup", "--max-grad-norm": "--clip",
    "--num-workers": "--nproc", "--precision": "--policy",
}  # fmt: skip
"""What other trainers call our flags."""
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_RANK_0_SPEAKS_S = 3.0

_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]  # click's ClickException, which typer may carry inside


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        verb = next((each for each in arguments if not each.startswith("-")), "")
        return int(command_line(verb)(arguments, prog_name="lpcompile", standalone_mode=False) or 0)
    except LpError as error:
        code = error.exit_code if isinstance(error, WorkerError) else 2
        leave_last_words(error, code)
        _complain(str(error), error.is_of_all_ranks)
        return code
    except _USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        verb = context.command_path if context else "lpcompile"
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message:  # none: a verb without arguments, whose help stands on stdout
            known = next(
                (ours for theirs, ours in _OTHER_NAMES.items() if f"{theirs} " in f"{message} ".replace(".", " ")), ""
            )
            message = f"{message.rstrip('.')}. It is {known} here." if known else message
            _complain(f"{verb}: {message.rstrip('.')}{'' if message.endswith('?') else '.'} Try {verb} --help.")
        return 2
    except (typer.Abort, KeyboardInterrupt):
        return 130


def _complain(sentence: str, is_of_all_ranks: bool = False) -> None:
    """Once: a worker that our launcher started is silent (the launcher speaks); under torchrun rank 0 speaks.

    Another rank speaks too if it is still there after a while: torchrun ends it at once where rank 0 failed as well.
    """
    if "--prepared" in sys.argv:
        return
    if is_worker() and (rank := os.environ["RANK"]) != "0":
        if is_of_all_ranks:
            return
        time.sleep(_RANK_0_SPEAKS_S)
        sentence = f"rank {rank}: {sentence.removeprefix(f'rank {rank}: ')}"
    print(sentence, file=sys.stderr, flush=True)


def is_worker() -> bool:
    """Whether torchrun started this process: its whole set of variables is there. A scheduler may set one or two."""
    return all(name in os.environ for name in _OF_TORCHRUN)


def _train(config: Path | None, prepared: bool, **flags: Any) -> None:
    """Train a language model or an image classifier under a policy, on one or many workers.

    Flags override --config, which overrides the config of the checkpoint in --resume, which overrides the defaults.

    \b
    Examples:
      lpcompile train --policy hfp8 --nproc 2
      lpcompile train --policy hfp8 --engine ddp --nproc 2 --compare fp32
      lpcompile train --model resnet --data digits --policy hfp8-2019 --engine none --compare fp32
      lpcompile train --model mobilenet --data mnist --layers 6 --policy fqt-5-psq --engine ddp --nproc 2
      lpcompile train --model resnet --data cifar-10-batches-py --layers 9 --augment crop-flip --optimizer sgd --lr 0.1
      lpcompile train --config run.yaml --steps 1000 --out runs/mine
      lpcompile train --resume runs/mine
      torchrun --nproc-per-node 8 -m launch train --config run.yaml --policy hfp8
    """
    base, base_name = {}, ""
    if flags.get("resume"):
        found = find_checkpoint(flags["resume"])
        base, base_name = read_record(found).inherited_config(), str(found)
    if is_worker():
        base.pop("nproc", None)
    run_config = load_config(flags, config, base, base_name)
    from launch.training.launcher import check_run, launch  # here, as all that imports torch

    if not is_worker():
        launch(run_config)
        return
    from launch.training.summary import present
    from launch.training.trainer import work

    if not prepared:
        check_run(run_config, int(os.environ["WORLD_SIZE"]))
        if run_config.compare:
            raise NotSupported(
                "under torchrun one command is one run", where="--compare", hint="--nproc N instead of torchrun"
            )
    folder = work(run_config, prepared)
    if not prepared and os.environ["RANK"] == "0":
        present(folder)


def _train_command() -> Any:
    """`_train` with one flag per field of RunConfig.

    Values arrive as text: the config checks them, and its sentences name the flag.
    """
    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None, typer.Option("--config", metavar="FILE", help="YAML file of fields below.")
            ],
        ),
        inspect.Parameter(
            "prepared",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--prepared", hidden=True)],
        ),
    ]
    for name, field in RunConfig.model_fields.items():
        is_flag = field.annotation is bool
        default = "" if field.default in (None, False) else f" (default: {field.default})"
        option = typer.Option(
            flag_of(name), help=f"{field.description}{default}", metavar=None if is_flag else _metavar(field.annotation)
        )
        annotation = Annotated[bool | None if is_flag else str | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    def train(**arguments: Any) -> None:
        _train(**arguments)

    train.__doc__ = _train.__doc__
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return train


def _metavar(annotation: Any) -> str:
    """What to write after a flag: choices as [a|b], else the type."""
    arguments = get_args(annotation)
    if arguments and not any(isinstance(each, type) for each in arguments) and get_origin(annotation) is not None:
        return f"[{'|'.join(str(each) for each in arguments)}]"
    kinds: dict[Any, str] = {int: "INTEGER", Whole: "INTEGER", float: "NUMBER", str: "TEXT"}
    return next((kinds[each] for each in (annotation, *arguments) if each in kinds), "TEXT")


def _bench(
    name: Annotated[str | None, typer.Argument(help="Which one; omitted: all.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Handed on to the benchmark.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Only say which there are.")] = False,
) -> None:
    """Run the benchmarks of a checkout: our speed beside what you would run instead, as ratios.

    \b
    Examples:
      lpcompile bench --list
      lpcompile bench
      lpcompile bench training_step
      lpcompile bench numerics -- --rounds 9
    """
    if list_only:
        for each, what in find_benchmarks().items():
            print(f"{each:24} {what}")
        return
    if code := run_benchmarks(name, arguments or []):
        raise typer.Exit(code)


def _refuse(verb: str, what: str) -> Any:
    def refuse() -> None:
        raise NotSupported(f'"{verb}" ({what}) is not in this version', hint="train, opt, policy, inspect, bench")

    refuse.__doc__ = f"Not in this version: {what}."
    return refuse


def command_line(verb: str | None = None) -> typer.Typer:
    """Every verb; of those in _APART `verb` alone is imported (None: all), the others are there by name."""
    app = typer.Typer(
        no_args_is_help=True, add_completion=False, help="One policy file for every number format a model trains in."
    )
    app.command("train")(_train_command())
    for name, (module, attribute, what) in _APART.items():
        if verb not in (None, name):
            app.command(name, help=what)(_nothing)
            continue
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    app.command("bench")(_bench)
    for name, what in _PLANNED.items():
        settings = {"allow_extra_args": True, "ignore_unknown_options": True}
        app.command(name, hidden=True, context_settings=settings)(_refuse(name, what))
    return app


def _nothing() -> None:
    """In the place of a verb that was not asked for."""
