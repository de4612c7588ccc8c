"""Loss scale: the share of gradients that fp16 makes zero, and of those that it saturates, against the scale.

Micikevicius et al., Mixed Precision Training, ICLR 2018: without a scale a large share of the gradients that are not
zero fall below 2^-24 and vanish; one of 8 and more brings them back. The gradients are those that reach the products of
nets after some steps in fp32.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from launch.reproduction.experiment import Form, Result
from launch.reproduction.gradients import output_gradients
from launch.reproduction.plots import figure, table
from launch.reproduction.training import image_config, text_config
from launch.training.config import RunConfig
from launch.training.images.packaged import is_installed
from runtime.numerics import quantize

TITLE = "Loss scale"

_STEPS = {"smallest": (5,), "short": (20, 100), "full": (20, 200, 1000)}
_POWERS = range(0, 31, 2)
_LARGEST = 65504.0


def units(form: Form) -> list[str]:
    models = (*(("resnet", "mobilenet") if is_installed("digits") else ()), "gpt")
    return [f"{model}_step{steps:04d}" for model in models for steps in _STEPS[form]]


def measure(key: str, form: Form) -> Result:
    """Of the gradients that are not zero in fp32: shares that are zero, and beyond fp16, when scaled by 2^power."""
    model, _, steps = key.partition("_step")
    g = torch.cat([each.flatten() for each in output_gradients(_config(model, int(steps))).values()])
    g = g[g != 0]
    return {"count": g.numel(), "median": g.abs().median().item(), **shares(g)}


def _config(model: str, steps: int) -> RunConfig:
    return text_config(steps=steps) if model == "gpt" else image_config(model, "digits", steps=steps)


def shares(g: Tensor) -> Result:
    scaled = [g * 2.0**power for power in _POWERS]
    return {
        "zero": [(quantize(each, "fp16") == 0).double().mean().item() for each in scaled],
        "beyond": [(each.abs() > _LARGEST).double().mean().item() for each in scaled],
    }


def tell(results: Mapping[str, Result], form: Form, plots: Path) -> str:
    powers = list(_POWERS)
    with figure(plots / "loss-scale.png") as axes:
        for color, (key, each) in enumerate(results.items()):
            axes.plot(powers, [100 * share for share in each["zero"]], ".-", color=f"C{color}", label=f"{key}: zero")
            axes.plot(powers, [100 * share for share in each["beyond"]], ":", color=f"C{color}", label="beyond 65504")
        axes.set(xlabel="log2 of the loss scale", ylabel="% of the gradients that are not zero")
        axes.legend(fontsize=7)
    shown = [power for power in powers if power in (0, 4, 8, 10, 16, 24)]
    rows = [
        [
            key,
            f"{each['count']:,}",
            f"{each['median']:.1e}",
            *(f"{100 * each['zero'][powers.index(p)]:.3f} %" for p in shown),
        ]
        for key, each in results.items()
    ]
    lines = []
    for key, each in results.items():
        before, after = each["zero"][0], each["zero"][powers.index(10)]
        verdict = "reproduced" if before > 0.01 and after < before / 10 else "contradicted"
        lines.append(f"- {key}: without a scale fp16 loses more than 1 % of the gradients, with 2^10 less than a tenth"
                     f" of those: **{verdict}**")  # fmt: skip
    head = ["net, after step", "gradients", "median", *(f"2^{power}" for power in shown)]
    return (
        "Share of the gradients (of those that are not zero) that are zero in fp16 at a loss scale. Published (ICLR"
        " 2018, SSD, from memory): 31 % of all gradient values fall below 2^-24; a scale of 8 to 2^15 brings the"
        " accuracy back. The deck: gradients down to 2^-30, hence scales of 2^6 to 2^10.\n\n"
        f"{table(head, rows)}\n\n" + "\n".join(lines) + f"\n\n![loss scale]({plots.name}/loss-scale.png)"
    )
