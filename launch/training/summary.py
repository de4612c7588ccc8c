"""Summary: the result of one run, or of two side by side, as summary.json, a table and a plot."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.training.config import ConfigError
from launch.training.last_words import WorkerError
from launch.training.metrics import StepMetrics, finite, read_metrics
from launch.training.monitor import unless_closed


@dataclass(frozen=True)
class Summary:
    """One finished run. Bytes are those that rank 0 sends per optimizer step."""

    policy: str
    policy_hash: str
    engine: str
    world_size: int
    parameters: int
    steps: int
    train_loss: float  # mean of the last tenth of the steps, nats per token or image
    validation_loss: float  # nats per token or image
    validation_per_byte: float | None  # nats per byte; None of images
    bigram: float | None  # nats per byte; None of images
    ms_per_step: float  # median
    tokens_per_s: float  # of all ranks, at the median step
    gradient_bytes: float
    predicted_gradient_bytes: float
    wire_agrees: bool  # counted == predicted in every step
    gradient_bytes_fp32: int  # what this engine would send uncompressed
    gradient_bytes_bf16: int
    total_bytes: float  # gradients and parameter gathers
    gemms: int
    gemms_as_asked: int
    backends: dict[str, int]
    skipped_steps: int
    loss_scale: float
    peak_memory: int  # bytes, of the largest rank
    corpus: str
    corpus_sha256: str
    folder: str
    graphs: int = 0  # that torch.compile captured, if it did
    products_in_graphs: int = 0  # FWD, BWD and GRAD each one, rewritten in them
    unit: str = "token"  # of a loss: token or image
    accuracy: float = math.nan  # share of the validation split that is answered right

    def save(self) -> None:
        text = json.dumps(finite(asdict(self)), indent=2, allow_nan=False)
        (Path(self.folder) / "summary.json").write_text(text + "\n")

    @property
    def failure(self) -> str:
        """What the run came to if it learned nothing that counts, as a sentence; else ""."""
        if 2 * self.skipped_steps > self.steps:
            return f"{self.policy}: {self.skipped_steps} of {self.steps} steps were skipped"
        losses = {"training": self.train_loss, "validation": self.validation_loss}
        bad = [name for name, loss in losses.items() if loss is None or not math.isfinite(loss)]
        return f"{self.policy}: the {bad[0]} loss is not finite" if bad else ""


@dataclass(frozen=True)
class StepTotals:
    """What the steps of a run come to."""

    train_loss: float
    ms_per_step: float
    tokens_per_s: float
    gradient_bytes: float
    predicted_gradient_bytes: float
    wire_agrees: bool
    total_bytes: float
    skipped_steps: int


def total(steps: list[StepMetrics]) -> StepTotals:
    """Medians for time (the first steps build kernels), means for loss and bytes."""
    ms = median(step.ms for step in steps)
    return StepTotals(
        train_loss=mean(step.loss for step in steps[-max(1, len(steps) // 10) :]),
        ms_per_step=ms,
        tokens_per_s=1000.0 * steps[-1].tokens / ms,
        gradient_bytes=mean(step.gradient_bytes for step in steps),
        predicted_gradient_bytes=mean(step.predicted_gradient_bytes for step in steps),
        wire_agrees=all(step.wire_agrees for step in steps),
        total_bytes=mean(step.gradient_bytes + step.parameter_bytes for step in steps),
        skipped_steps=sum(step.skipped for step in steps),
    )


def load_summary(folder: Path) -> Summary:
    try:
        values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        is_number = {each.name for each in fields(Summary) if each.type in ("float", float)}
        values |= {key: math.nan for key, each in values.items() if each is None and key in is_number}
        return Summary(**values)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError("this run has no readable summary", where=str(folder), got=str(error)) from None


def present(folder: Path, other: Path | None = None) -> None:
    """Plot and print a finished run, and the one it is compared with.

    Raises WorkerError, for the exit code 1, where a run came to nothing: most steps skipped, or a loss not finite.
    """
    folders = [folder, *([other] if other else [])]
    runs = [load_summary(each) for each in folders]
    plot_losses(folder / "loss.png", runs)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)  # a log file has no edge at 80
    with unless_closed():
        console.print(build_table(runs))
        console.print(
            f"{folder}/: checkpoints/, tensorboard/, loss.png, summary.json, certificate.txt (what each GEMM runs as)",
            markup=False,
            soft_wrap=True,
        )
    if failures := [run.failure for run in runs if run.failure]:
        hint = "a smaller --lr, a dynamic loss_scale in the policy, or formats with a wider range"
        raise WorkerError("; ".join(failures), 1, where=str(folder), hint=hint)


def num_workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def build_table(runs: list[Summary]) -> Table:
    table = Table(title=f"{runs[0].engine}, {num_workers(runs[0].world_size)}, {runs[0].parameters:,} parameters")
    table.add_column("")
    for run in runs:
        table.add_column(run.policy, justify="right")
    is_pair = len(runs) == 2
    if is_pair:
        table.add_column("difference", justify="right")
    for label, cell, difference in _ROWS:
        cells = [cell(run) for run in runs]
        if any(cells):
            table.add_row(
                label.replace("UNIT", runs[0].unit), *cells, *([difference(runs[0], runs[1])] if is_pair else [])
            )
    return table


def plot_losses(path: Path, runs: list[Summary]) -> None:
    """Training loss (mean over a fiftieth of the run) and validation points; of text in nats per byte, beside the byte
    bigram's.
    """
    import matplotlib as mpl  # here: its import takes a second that no other verb should wait

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run in runs:
        steps = read_metrics(Path(run.folder))
        per_byte = (run.validation_per_byte or 0.0) / run.validation_loss if run.validation_loss else 1.0
        per_byte = per_byte or 1.0
        color = f"C{runs.index(run)}"
        axes.plot(
            [step.step for step in steps],
            [loss * per_byte for loss in _smooth([step.loss for step in steps], max(1, len(steps) // 50))],
            color=color,
            label=f"{run.policy}: training",
        )
        seen = [(step.step, step.validation * per_byte) for step in steps if step.validation is not None]
        axes.plot([x for x, _ in seen], [y for _, y in seen], "o", color=color, label=f"{run.policy}: validation")
    if runs[0].bigram is not None:
        axes.axhline(runs[0].bigram, color="grey", linestyle="--", label="byte bigram")
    axes.set(
        xlabel="optimizer step",
        ylabel=f"loss, nats per {'byte' if runs[0].unit == 'token' else runs[0].unit}",
        title=f"{runs[0].engine}, {num_workers(runs[0].world_size)}",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: list[float], width: int) -> list[float]:
    return [mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _ratio(name: Callable[[Summary], float]) -> Callable[[Summary, Summary], str]:
    return lambda ours, theirs: f"{name(ours) / name(theirs):.2f}x" if name(theirs) else ""


def _gap(name: Callable[[Summary], float]) -> Callable[[Summary, Summary], str]:
    return lambda ours, theirs: f"{100 * (name(ours) / name(theirs) - 1):+.2f} %" if name(theirs) else ""


def _none(ours: Summary, theirs: Summary) -> str:
    return ""


def _gradient_bytes(run: Summary) -> str:
    if not run.gradient_bytes:
        return ""
    return f"{run.gradient_bytes:,.0f} {'=' if run.wire_agrees else '!='} {run.predicted_gradient_bytes:,.0f}"


def _uncompressed(run: Summary) -> str:
    if not run.gradient_bytes:
        return ""
    return f"{run.gradient_bytes_fp32 / run.gradient_bytes:.2f}x / {run.gradient_bytes_bf16 / run.gradient_bytes:.2f}x"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _gemms(run: Summary) -> str:
    return f"{run.gemms_as_asked} of {run.gemms}" if run.gemms else "left alone"


def _graphs(run: Summary) -> str:
    return f"{run.graphs}, {run.products_in_graphs}" if run.graphs else ""


def _backends(run: Summary) -> str:
    return "\n".join(f"{count} {name}" for name, count in sorted(run.backends.items()))


# One row: label, one run's cell, the difference of two runs. A row whose cells are all empty is not shown.
_ROWS: list[tuple[str, Callable[[Summary], str], Callable[[Summary, Summary], str]]] = [
    ("final training loss (nats/UNIT)", lambda run: f"{run.train_loss:.4f}", _gap(lambda run: run.train_loss)),
    ("final validation loss (nats/UNIT)", lambda run: f"{run.validation_loss:.4f}",
     _gap(lambda run: run.validation_loss)),
    ("  in nats/byte", lambda run: _number(run.validation_per_byte), _gap(lambda run: run.validation_per_byte or 0.0)),
    ("  byte-bigram baseline", lambda run: _number(run.bigram), _none),
    ("final validation accuracy", lambda run: "" if math.isnan(run.accuracy) else f"{100 * run.accuracy:.2f} %",
     lambda ours, theirs: f"{100 * (ours.accuracy - theirs.accuracy):+.2f} points"),
    ("ms per step (median)", lambda run: f"{run.ms_per_step:.0f}", _ratio(lambda run: run.ms_per_step)),
    ("UNITs/s", lambda run: f"{run.tokens_per_s:,.0f}", _ratio(lambda run: run.tokens_per_s)),
    ("gradient bytes per step: counted, predicted", _gradient_bytes, _ratio(lambda run: run.gradient_bytes)),
    ("  smaller than this engine's fp32 / bf16", _uncompressed, _none),
    ("bytes per step with parameter gathers", lambda run: f"{run.total_bytes:,.0f}" if run.total_bytes else "",
     _ratio(lambda run: run.total_bytes)),
    ("GEMMs running as the policy says", _gemms, _none),
    ("  by backend", _backends, _none),
    ("joint graphs captured, products rewritten in them", _graphs, _none),
    ("skipped steps, final loss scale", lambda run: f"{run.skipped_steps}, {run.loss_scale:g}", _none),
    ("peak memory of a worker (MB)", lambda run: f"{run.peak_memory / 1e6:,.0f}", _ratio(lambda run: run.peak_memory)),
]  # fmt: skip
