"""Plots: one figure, saved as a PNG beside the page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def figure(path: Path, columns: int = 1, width: float = 8.0, height: float = 4.2) -> Iterator[Any]:
    """The axes (a list, where there are several columns) of a figure that is saved as the block ends."""
    import matplotlib as mpl  # here: its import takes a second

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    try:
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=110)
    finally:
        plt.close(drawn)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
