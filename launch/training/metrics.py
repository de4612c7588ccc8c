"""Metrics: what one step reports, and its three homes: metrics.jsonl, TensorBoard, memory."""

import json
import math
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, as one line of metrics.jsonl."""

    step: int  # from 1: steps done
    loss: float  # mean over ranks and micro-batches, nats per token or image; not finite: null in the file
    lr: float
    ms: float  # milliseconds, from the first micro-batch to the end of the update
    tokens: int  # of all ranks; images of a model that reads images
    loss_scale: float
    skipped: bool
    grad_norm: float | None  # before clipping, where the engine knows it
    gradient_bytes: int  # sent by rank 0 for gradients
    parameter_bytes: int  # sent by rank 0 to gather parameters
    predicted_gradient_bytes: int  # by the ledger
    wire_agrees: bool  # counted == predicted, for gradients and parameters
    validation: float | None = None  # loss on the validation split after this step, nats per token or image
    accuracy: float | None = None  # share of the validation split that is answered right
    overflowed: str = ""  # of a skipped step: rank, layer and role that overflowed first

    @property
    def tokens_per_s(self) -> float:
        return 1000.0 * self.tokens / self.ms if self.ms else 0.0


class MetricsLog:
    """Writes steps as they come. Opened on a folder with a longer history, it keeps the steps before `start` only."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: its import takes seconds, and rank 0 alone needs it

        path = folder / "metrics.jsonl"
        self.steps = [step for step in read_metrics(folder) if step.step <= start]
        path.write_text("".join(_line(step) for step in self.steps))
        threading.excepthook = _tell_unless_of_a_disk
        self._file = path.open("a", buffering=1)
        self.board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, step: StepMetrics) -> None:
        self.steps.append(step)
        self._file.write(_line(step))
        scalars = {
            "loss/train": step.loss,
            "loss/validation": step.validation,
            "accuracy/validation": step.accuracy,
            "speed/ms_per_step": step.ms,
            "speed/tokens_per_s": step.tokens_per_s,
            "scaling/loss_scale": step.loss_scale,
            "scaling/skipped": float(step.skipped),
            "optimizer/lr": step.lr,
            "optimizer/grad_norm": step.grad_norm,
            "wire/gradient_bytes": step.gradient_bytes,
            "wire/parameter_bytes": step.parameter_bytes,
        }
        for name, value in scalars.items():
            if value is not None and math.isfinite(value):
                self.board.add_scalar(name, value, step.step)

    def close(self) -> None:
        self._file.close()
        self.board.close()


def read_metrics(folder: Path) -> list[StepMetrics]:
    """The steps of a run; a last line cut short by a lost process is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    steps = []
    for line in path.read_text().splitlines():
        try:
            step = StepMetrics(**json.loads(line))
        except (ValueError, TypeError):
            break
        steps.append(replace(step, loss=math.nan) if step.loss is None else step)
    return steps


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None in the place of NaN and infinity, which JSON does not have."""
    return {key: None if isinstance(each, float) and not math.isfinite(each) else each for key, each in values.items()}


def _tell_unless_of_a_disk(error: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands what a disk says on to whoever writes next: that is told, as a sentence."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def _line(step: StepMetrics) -> str:
    return json.dumps(finite(asdict(step)), allow_nan=False) + "\n"
