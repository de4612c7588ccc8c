"""Training: one run of the trainer in this process, from a config to what it came to."""

import math
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from launch.reproduction.experiment import Result
from launch.training.config import RunConfig
from launch.training.trainer import Run
from launch.training.world import lone_world
from lpcompile import Policy, load_policy, report
from runtime.errors import LpError

_POINTS = 40  # of a loss curve


def train(config: RunConfig, policy: Policy | None = None) -> Result:
    """Loss and accuracy on the validation split at the end, and the curve of the training loss.

    A run that the trainer gives up (every step skipped) ends where it was given up, and `stopped` says why.
    """
    began, losses, skipped, stopped = time.perf_counter(), list[float](), 0, ""
    with lone_world(torch.device("cpu")) as world, tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run(config, policy or load_policy(config.policy), Path(folder), world)
        try:
            for step in range(config.steps):
                metrics = run.step(step)
                losses.append(metrics.loss)
                skipped += metrics.skipped
        except LpError as error:
            stopped = str(error)
        validation, accuracy = run.evaluate()
        gemms = report(run.model).gemms
    return {
        "validation": _or_none(validation),
        "accuracy": accuracy,
        "train": _or_none(mean(losses[-max(1, len(losses) // 10) :])),
        "curve": [_or_none(each) for each in losses[:: max(1, len(losses) // _POINTS)]],
        "skipped": skipped,
        "stopped": stopped,
        "parameters": run.num_parameters,
        "gemms": len(gemms),
        "gemms_as_asked": sum(gemm.runs_as_policy_says for gemm in gemms),
        "seconds": round(time.perf_counter() - began, 1),
    }


def image_config(model: str, data: str, **changes: Any) -> RunConfig:
    """Momentum SGD as the papers train; small enough for a CPU."""
    values: dict[str, Any] = {
        "engine": "none", "optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4, "warmup": 10, "eval_every": 0,
        "device": "cpu", "policy": "fp32",
    }  # fmt: skip
    return RunConfig(model=model, data=data, **(values | changes))


def text_config(**changes: Any) -> RunConfig:
    """A GPT-2 of 2 layers of width 64 on Python's documentation, by AdamW."""
    values: dict[str, Any] = {
        "engine": "none", "eval_every": 0, "device": "cpu", "policy": "fp32", "layers": 2, "width": 64, "heads": 2,
        "context": 64, "batch": 8, "lr": 1e-3, "warmup": 20,
    }  # fmt: skip
    return RunConfig(**(values | changes))


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
