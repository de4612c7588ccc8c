"""Timing: contenders take turns, so that a change of the machine's speed hits all of them; medians are compared.

Beside every table stands what the machine did in this run (_machine.py): the same code is up to half slower on one
whose cores are far from each other, and a ratio over fp32 depends on what fp32's product is.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._machine import machine


def show(*tables: Table, width: int | None = None) -> None:
    """Print the tables, and the state of the machine with the threads that torch has."""
    console = Console(width=width)
    for table in tables:
        console.print(table)
    console.print(str(machine(torch.get_num_threads())), highlight=False)


def median_ms(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmups: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each contender over `rounds` turns, after `warmups` untimed calls."""
    times = _times(contenders, rounds, warmups, clock)
    return {name: statistics.median(values) for name, values in times.items()}


def least_ms(contenders: dict[str, Callable[[], object]], rounds: int, warmups: int = 2) -> dict[str, float]:
    """The least instead of the median: for many short rows, of which another process would hit some and not others."""
    return {name: min(values) for name, values in _times(contenders, rounds, warmups).items()}


def _times(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmups: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    for run in contenders.values():
        for _ in range(warmups):
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = clock()
            run()
            times[name].append(1e3 * (clock() - start))
    return times
