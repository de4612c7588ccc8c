"""Timing: contenders take turns, so that a change of the machine's speed hits all of them; medians are compared."""

import statistics
import time
from collections.abc import Callable


def median_ms(contenders: dict[str, Callable[[], object]], rounds: int, warmups: int = 2) -> dict[str, float]:
    """Median milliseconds of each contender over `rounds` turns, after `warmups` untimed calls."""
    for run in contenders.values():
        for _ in range(warmups):
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
