"""FQT: the gradient quantizers PTQ, PSQ and BHQ in 4 to 8 bits: noise, bias, and what training with them comes to.

Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks", NeurIPS 2020: stochastic
rounding over B = 2^b - 1 steps has no bias and a variance that falls as 1 / B^2.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.reproduction.experiment import Form, Result
from launch.reproduction.gradients import output_gradients
from launch.reproduction.plots import figure, table
from launch.reproduction.statistics import paired
from launch.reproduction.training import image_config, train
from launch.training.images.packaged import is_installed
from runtime.numerics import quantize

TITLE = "FQT: low-bit gradients"

KINDS, BITS = ("ptq", "psq", "bhq"), range(4, 9)
_DRAWS = {"smallest": 50, "short": 400, "full": 2000}
_SAMPLES, _FEATURES = 32, 256
_LAYER = "blocks.1.second.0"
_SEEDS = {"smallest": 0, "short": 1, "full": 5}
_STEPS = {"smallest": 0, "short": 60, "full": 200}
_TRAINED_BITS = {"smallest": (), "short": (4, 8), "full": (4, 5, 6, 8)}


def units(form: Form) -> list[str]:
    gradients = ["even", "uneven", *(["resnet"] if is_installed("digits") else [])]
    noise = [f"noise_{gradient}_{kind}{bits}" for gradient in gradients for kind in KINDS for bits in BITS]
    recipes = ["fp32", *(f"fqt-{bits}-{kind}" for bits in _TRAINED_BITS[form] for kind in KINDS)]
    seeds = range(_SEEDS[form] if is_installed("digits") else 0)
    return noise + [f"train_{recipe}_seed{seed:02d}" for seed in seeds for recipe in recipes]


def measure(key: str, form: Form) -> Result:
    what, name, rest = key.split("_")
    if what == "train":
        config = image_config("resnet", "digits", seed=int(rest.removeprefix("seed")), steps=_STEPS[form])
        return train(config.model_copy(update={"policy": name}))
    return noise(_gradient(name), rest, _DRAWS[form])


def noise(g_ND: Tensor, format: str, draws: int) -> Result:
    """Of `draws` stochastic casts of g: E |Q(g) - g|^2 over |g|^2, and the mean error over all elements in its standard
    errors, which has mean 0 and deviation 1 where there is no bias.
    """
    squares, means = 0.0, list[float]()
    for step in range(draws):
        error_ND = quantize(g_ND, format, rounding="stochastic", seed=11, step=step).double() - g_ND.double()
        squares += error_ND.square().sum().item()
        means.append(error_ND.mean().item())
    mean = sum(means) / draws
    error = math.sqrt(sum((each - mean) ** 2 for each in means) / (draws - 1) / draws)
    return {"variance": squares / draws / g_ND.double().square().sum().item(), "bias": mean / error}


def ratio(bits: int) -> float:
    """What a bit less costs: the squared ratio of the numbers of steps."""
    return float(((2**bits - 1) / (2 ** (bits - 1) - 1)) ** 2)


def tell(results: Mapping[str, Result], form: Form, plots: Path) -> str:
    parts = [_told_noise(results, form, plots)]
    if any(key.startswith("train_") for key in results):
        parts.append(_told_training(results, form))
    return "\n\n".join(parts)


def _told_noise(results: Mapping[str, Result], form: Form, plots: Path) -> str:
    names = [name for name in _GRADIENTS
             if all(f"noise_{name}_{kind}{bits}" in results for kind in KINDS for bits in BITS)]  # fmt: skip
    rows, lines = [], []
    with figure(plots / "fqt-variance.png", columns=max(2, len(names)), width=12, height=3.8) as axes:
        for name, axis in zip(names, axes, strict=False):
            for kind in KINDS:
                seen = {bits: results[f"noise_{name}_{kind}{bits}"] for bits in BITS}
                axis.plot(list(seen), [each["variance"] for each in seen.values()], ".-", label=kind.upper())
                steps = [(bits, seen[bits - 1]["variance"] / seen[bits]["variance"]) for bits in BITS[1:]]
                off = max(abs(each / ratio(bits) - 1) for bits, each in steps)
                bias = max(abs(each["bias"]) for each in seen.values())
                noises = [f"{each['variance']:.2e}" for each in seen.values()]
                rows.append([f"{_GRADIENTS[name]}: {kind.upper()}", *noises,
                             f"{100 * off:.1f} %", f"{bias:.1f}",
                             f"**{'reproduced' if off <= 0.1 and bias <= 4 else 'contradicted'}**"])  # fmt: skip
            axis.set(yscale="log", xlabel="bits", title=_GRADIENTS[name], ylabel="noise / |g|^2")
            axis.legend(fontsize=7)
            ptq, psq, bhq = ([results[f"noise_{name}_{kind}{bits}"]["variance"] for bits in BITS] for kind in KINDS)
            worse = [bits for bits, one, two in zip(BITS, bhq, psq, strict=True) if one > two]
            if name == "uneven":
                lines.append("- BHQ is at most PSQ where the ranges of the samples differ, in all widths: "
                             f"**{'reproduced' if not worse else 'contradicted'}**")  # fmt: skip
            else:
                lines.append(
                    f"- {_GRADIENTS[name]}: BHQ is above PSQ in {len(worse)} of {len(BITS)} widths (not claimed)"
                )
            above = [bits for bits, one, two in zip(BITS, psq, ptq, strict=True) if one > 1.001 * two]
            lines.append(f"- {_GRADIENTS[name]}: PSQ is at most PTQ in all widths: "
                         f"**{'reproduced' if not above else 'contradicted'}**")  # fmt: skip
    head = ["gradient", *(f"{bits} bits" for bits in BITS), "off the ratio", "bias, in s.e.", "verdict"]
    return (
        f"Noise E|Q(g) - g|^2 / |g|^2 over {_DRAWS[form]} casts. Claimed: from b - 1 to b bits it falls by ((2^b - 1) /"
        " (2^(b-1) - 1))^2 (4.6 at 4 bits, 4.03 at 8), within 10% here, and no bias: the mean error over all elements"
        " within 4 of its standard errors in every width (the largest is shown).\n\n"
        f"{table(head, rows)}\n\nThe ratio is that of steps that are small beside the values. Where most values are"
        " smaller than a step, as with one range for samples that differ, noise falls as the step and not as its"
        " square; and PTQ moves its range until zero is one of the steps, by up to a step.\n\n"
        + "\n".join(lines)
        + f"\n\n![variance]({plots.name}/fqt-variance.png)"
    )


def _told_training(results: Mapping[str, Result], form: Form) -> str:
    rows = []
    recipes = list(dict.fromkeys(key.split("_")[1] for key in results if key.startswith("train_")))
    for recipe in recipes:
        pairs = [
            (100 * each["accuracy"], 100 * results[f"train_fp32_{key.split('_')[2]}"]["accuracy"])
            for key, each in results.items()
            if key.startswith(f"train_{recipe}_") and f"train_fp32_{key.split('_')[2]}" in results
        ]
        found = paired([one for one, _ in pairs], [two for _, two in pairs])
        if not pairs:
            continue
        interval = f"{found.low:+.2f} to {found.high:+.2f}" if found.count > 1 and recipe != "fp32" else ""
        mean = sum(one for one, _ in pairs) / len(pairs)
        rows.append(
            [recipe, f"{found.count}", f"{mean:.2f}", f"{found.mean:+.2f}", interval, _PUBLISHED.get(recipe, "")]
        )
    head = ["recipe", "seeds", "accuracy, %", "beside fp32", "95% interval", "published, ResNet-50 (exact 77.09)"]
    return (
        f"Training with them: the ResNet and digits of `accuracy`, {_STEPS[form]} steps, first convolution and last"
        f" layer included as the paper has them.\n\n{table(head, rows)}"
    )


_GRADIENTS = {
    "even": "normal, all samples alike",
    "uneven": "one sample of 32 100 times larger",
    "resnet": "a ResNet's, 20 steps in",
}
_PUBLISHED = {
    "fqt-8-ptq": "76.40", "fqt-8-psq": "77.40", "fqt-8-bhq": "77.36", "fqt-6-ptq": "76.06", "fqt-6-psq": "76.97",
    "fqt-6-bhq": "77.25", "fqt-5-ptq": "74.62", "fqt-5-psq": "76.30", "fqt-5-bhq": "76.83", "fqt-4-ptq": "diverges",
    "fqt-4-psq": "73.78", "fqt-4-bhq": "74.75",
}  # fmt: skip
_CACHE: dict[str, Any] = {}


def _gradient(name: str) -> Tensor:
    """(samples, features), fp32."""
    if name == "resnet":
        if name not in _CACHE:
            found = output_gradients(image_config("resnet", "digits", steps=20))
            _CACHE[name] = found[_LAYER].flatten(1)
        cached: Tensor = _CACHE[name]
        return cached
    g_ND = torch.randn(_SAMPLES, _FEATURES, generator=torch.Generator().manual_seed(3))
    if name == "uneven":
        g_ND[0] *= 100
    return g_ND
