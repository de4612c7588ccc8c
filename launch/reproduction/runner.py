"""Runner: measure what is not there yet, unit by unit, and write the page of all that is."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from launch.reproduction.experiment import Experiment, Form, Result
from launch.reproduction.registry import EXPERIMENTS, experiment
from launch.reproduction.store import Store
from launch.training.config import ConfigError
from launch.training.last_words import told
from launch.training.monitor import unless_closed


def reproduce(names: list[str], form: Form, out: Path, docs: Path, page_only: bool = False) -> Path:
    """Run the experiments called `names` (none: all) and return the page, docs/reproduction.md.

    A unit whose result is in `out` is not run again. Ctrl-C loses the unit at hand, and the page is written of the
    rest. Raises ConfigError for names and folders, and LpError for a full disk.
    """
    chosen = {name: experiment(name) for name in names or EXPERIMENTS}
    if importlib.util.find_spec("scipy") is None:  # said now, and not after hours
        raise ConfigError(
            "the page's statistics are scipy's, which is not installed", where="reproduce", hint="pip install scipy"
        )
    stores = {name: Store(out, form, name) for name in EXPERIMENTS}
    console = Console(highlight=False)
    try:
        if not page_only:
            with _one_thread_less_noise(), _progress(console) as progress:
                for name, module in chosen.items():
                    _measure(name, module, form, stores[name], progress)
    except OSError as error:
        raise told(error, out) or error from error
    finally:
        page = write_page(form, stores, docs)
    with unless_closed():
        console.print(f"{page}, from the results in {out / form}/", markup=False, soft_wrap=True)
    return page


def write_page(form: Form, stores: dict[str, Store], docs: Path) -> Path:
    """docs/reproduction.md of every experiment, and its plots in docs/reproduction/."""
    page, plots = docs / "reproduction.md", docs / "reproduction"
    docs.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, store in stores.items():
        module = experiment(name)
        results = _found(module.units(form), store)
        done = f"{len(results)} of {len(module.units(form))} units"
        told_of = module.tell(results, form, plots) if results else "Not run in this form."
        sections.append(f"## {module.TITLE}\n\n`{name}`, {done}.\n\n{told_of}\n")
    page.write_text(_HEAD.format(form=form, torch=torch.__version__) + "\n".join(sections), encoding="utf-8")
    return page


_HEAD = """# Reproduction

Published claims about low-precision training, run again. `lpcompile reproduce --{form}` (or `make reproduce`) writes
this page, and goes on where it was stopped. Every number and verdict below comes from runs (torch {torch}, CPU); what
does not reproduce is said to. Not run: the late forward switch of NVFP4.

"""


def _measure(name: str, module: Experiment, form: Form, store: Store, progress: Progress) -> None:
    keys = module.units(form)
    missing = [key for key in keys if store.load(key) is None]
    task = progress.add_task(name, total=len(keys), completed=len(keys) - len(missing), state="")
    for key in missing:
        progress.update(task, state=key)
        store.save(key, module.measure(key, form))
        progress.advance(task)
        if not progress.console.is_terminal:
            print(f"{name}: {key}", flush=True)
    progress.update(task, state="")


def _found(keys: list[str], store: Store) -> dict[str, Result]:
    found = {key: store.load(key) for key in keys}
    return {key: each for key, each in found.items() if each is not None}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:18}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        disable=not sys.stdout.isatty(),
    )


@contextmanager
def _one_thread_less_noise() -> Iterator[None]:
    """One thread: nets this small gain nothing by a second one, and the bits depend on no machine's core count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
