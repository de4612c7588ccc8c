"""Update rounding: weights that are kept in 1-6-9 and updated with nearest or with stochastic rounding.

stall   w = 1 and 4096 updates of 2^-12, half of 1-6-9's last bit being 2^-10: nearest stays, stochastic ends at 2
train   momentum SGD whose three AXPYs round to 1-6-9, everything else in fp32
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from launch.reproduction.experiment import Form, Result
from launch.reproduction.plots import figure, table
from launch.reproduction.statistics import paired, verdict
from launch.reproduction.training import image_config, train
from launch.training.images.packaged import is_installed
from lpcompile import Policy
from lpcompile.policy.resolve import Update
from runtime.optim.formats import UpdateFormats
from runtime.optim.sgd import LowPrecisionSGD

TITLE = "Rounding of the update"

_ROUNDINGS = ("nearest_even", "stochastic")
_UPDATES, _WEIGHTS = 4096, 1024
_SEEDS = {"smallest": 0, "short": 2, "full": 10}
_STEPS = {"smallest": 0, "short": 100, "full": 400}
_LR = 0.001  # small, so that updates fall below half of a weight's last bit


def units(form: Form) -> list[str]:
    stall = [f"stall_{rounding}" for rounding in _ROUNDINGS]
    seeds = range(_SEEDS[form] if is_installed("digits") else 0)
    return stall + [f"train_{name}_seed{seed:02d}" for seed in seeds for name in ("fp32", *_ROUNDINGS)]


def measure(key: str, form: Form) -> Result:
    what, name, *rest = key.replace("nearest_even", "nearest-even").split("_")
    rounding = name.replace("-", "_")
    if what == "stall":
        return stall(rounding)
    config = image_config("resnet", "digits", seed=int(rest[0].removeprefix("seed")), steps=_STEPS[form], lr=_LR)
    if name == "fp32":
        return train(config)
    update = Update(master="dlfloat16", momentum="dlfloat16", rounding=rounding)  # type: ignore[arg-type]
    return train(config, Policy(name=f"1-6-9-{name}", update=update))


def stall(rounding: str) -> Result:
    """Mean and deviation of weights that began at 1, after the updates: exactly 2."""
    weights = torch.nn.Parameter(torch.ones(_WEIGHTS))
    formats = UpdateFormats("1-6-9", "1-6-9", rounding=rounding)  # type: ignore[arg-type]
    optimizer = LowPrecisionSGD([weights], lr=1.0, momentum=0.0, formats=formats, seed=5)
    for _ in range(_UPDATES):
        weights.grad = torch.full_like(weights, -1.0 / _UPDATES)
        optimizer.step()
    values = weights.detach().double()
    return {"mean": values.mean().item(), "deviation": values.std().item()}


def tell(results: Mapping[str, Result], form: Form, plots: Path) -> str:
    parts = []
    if all(f"stall_{rounding}" in results for rounding in _ROUNDINGS):
        nearest, stochastic = (results[f"stall_{rounding}"] for rounding in _ROUNDINGS)
        error = stochastic["deviation"] / math.sqrt(_WEIGHTS)
        is_stalled, is_unbiased = nearest["mean"] == 1.0, abs(stochastic["mean"] - 2.0) <= 4 * error
        expected = ("1.0000 (stays)", "2.0000, deviation 0.041")
        rows = [
            [name, f"{each['mean']:.4f}", f"{each['deviation']:.4f}", should]
            for name, each, should in zip(("nearest", "stochastic"), (nearest, stochastic), expected, strict=True)
        ]
        parts.append(
            f"{_WEIGHTS} weights of 1 in 1-6-9, {_UPDATES} updates of 2^-12 by `LowPrecisionSGD`; exact: 2.\n\n"
            f"{table(['rounding', 'mean', 'deviation', 'expected'], rows)}\n\n"
            f"- A nearest-rounded update stalls: **{'reproduced' if is_stalled else 'contradicted'}**\n"
            f"- A stochastic one does not, and has no bias (4 standard errors: {4 * error:.4f}):"
            f" **{'reproduced' if is_unbiased else 'contradicted'}**"
        )
    seeds = [key.rpartition("seed")[2] for key in results if key.startswith("train_fp32_")]
    whole = [seed for seed in seeds if all(f"train_{each}_seed{seed}" in results for each in _ROUNDINGS)]
    if whole:
        parts.append(_told_training(results, whole, form, plots))
    return "\n\n".join(parts)


def _told_training(results: Mapping[str, Result], seeds: list[str], form: Form, plots: Path) -> str:
    rows, lines = [], []
    of = {name: [results[f"train_{name}_seed{seed}"] for seed in seeds] for name in ("fp32", *_ROUNDINGS)}
    losses = {name: [each["train"] for each in found] for name, found in of.items()}
    for name, found in of.items():
        accuracy = paired(*([100 * each["accuracy"] for each in one] for one in (found, of["fp32"])))
        loss = paired(losses[name], losses["fp32"])
        interval = f"{accuracy.low:+.2f} to {accuracy.high:+.2f}" if name != "fp32" and accuracy.count > 1 else ""
        mean = sum(100 * each["accuracy"] for each in found) / len(found)
        rows.append([name, f"{len(found)}", f"{sum(losses[name]) / len(found):.4f}", f"{loss.mean:+.4f}", f"{mean:.2f}",
                     f"{accuracy.mean:+.2f}", interval])  # fmt: skip
    gain = paired(losses["nearest_even"], losses["stochastic"])
    comes_to = verdict(gain, 0.0, math.inf, is_away_from_zero=True)
    lines.append(f"- The training loss ends higher with nearest than with stochastic rounding ({gain.mean:+.4f},"
                 f" {gain.low:+.4f} to {gain.high:+.4f}): **{comes_to}**")  # fmt: skip
    with figure(plots / "update-rounding.png") as axes:
        for name, found in of.items():
            axes.plot(found[0]["curve"], label=name)
        axes.set(xlabel=f"{_STEPS[form]} steps", ylabel="training loss", yscale="log", title="first seed")
        axes.legend()
    head = ["update in 1-6-9", "seeds", "training loss", "beside fp32", "accuracy, %", "beside fp32", "95% interval"]
    return (
        f"The ResNet and digits of `accuracy`, {_STEPS[form]} steps at a rate of {_LR}; all but the update is fp32."
        f"\n\n{table(head, rows)}\n\n" + "\n".join(lines) + f"\n\n![update]({plots.name}/update-rounding.png)"
    )
