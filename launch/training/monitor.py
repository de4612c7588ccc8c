"""Monitor: the run as it goes. A live line on a terminal, a plain line now and then elsewhere."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from launch.training.metrics import StepMetrics

_NARROW = 110  # columns; below, counts and time to go are worth more than a bar
_PLAIN_LINES = 15  # per run, where there is no terminal


class Monitor:
    """Shows steps. Does nothing on ranks other than the first."""

    def __init__(self, title: str, start: int, steps: int, is_first: bool, unit: str = "token") -> None:
        self._unit, self._title, self._steps, self._is_first = unit, title, steps, is_first
        self._every = max(1, steps // _PLAIN_LINES)
        self._console = Console(file=sys.stdout, highlight=False)
        self._progress: Progress | None = None
        if is_first and self._console.is_terminal:
            is_narrow = self._console.width < _NARROW
            self._progress = Progress(
                *([] if is_narrow else [TextColumn("[bold]{task.description}"), BarColumn(bar_width=24)]),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                *([] if is_narrow else [TaskProgressColumn()]),
                TextColumn("{task.fields[state]}"),  # last: where a line is too short, this is cut
                console=self._console,
            )
            self._task = self._progress.add_task(title, total=steps, completed=start, state="")

    def __enter__(self) -> "Monitor":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def say(self, text: str) -> None:
        """One line above the progress."""
        if self._is_first:
            with unless_closed():
                self._console.print(text, markup=False, soft_wrap=True)

    def show(self, step: StepMetrics) -> None:
        if not self._is_first:
            return
        state = describe_step(step, self._unit)
        if self._progress:
            shown = f"loss {step.loss:.4f}  {step.ms:.0f} ms" if self._console.width < _NARROW else state
            self._progress.update(self._task, completed=step.step, state=shown)
        if step.validation is not None:
            self.say(f"{self._title}: step {step.step}/{self._steps}  {state}{_validation(step)}")
        elif step.skipped:
            self.say(f"{self._title}: step {step.step} skipped: {why_skipped(step)}")
        elif not self._progress and (step.step % self._every == 0 or step.step in (1, self._steps)):
            self.say(f"{self._title}: step {step.step}/{self._steps}  {state}")


@contextmanager
def unless_closed() -> Iterator[None]:
    """Printing into a pipe that its reader has closed (`| head -2`) is no reason to lose a run: the rest is unsaid."""
    try:
        yield
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # rich makes the second of the first
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def why_skipped(step: StepMetrics) -> str:
    """A scale above 1 backs off and may cure it; at 1 nothing is left to back off."""
    first = f", first in {step.overflowed}" if step.overflowed else ""
    if step.loss_scale > 1:
        return f"a gradient overflowed{first}; loss scale {step.loss_scale:g}"
    return f"a gradient is not finite at loss scale 1{first}: the run diverges"


def _validation(step: StepMetrics) -> str:
    right = "" if step.accuracy is None else f", {100 * step.accuracy:.1f} % right"
    return f"  validation {step.validation:.4f}{right}"


def describe_step(step: StepMetrics, unit: str = "token") -> str:
    scale = f"  scale {step.loss_scale:g}" if step.loss_scale != 1.0 else ""
    return f"loss {step.loss:.4f}  {step.ms:.0f} ms  {step.tokens_per_s:,.0f} {unit}s/s{scale}"
