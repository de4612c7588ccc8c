"""Four bits: the error of NVFP4 casts of Gaussian numbers, and what share of the true value is left in the mean.

Panferov et al., Quartet II, arXiv 2601.22813: stochastic rounding is unbiased only if no block scale is rounded below
what its largest element needs, and MS-EDEN is unbiased at half of its error; Cook et al., Four Over Six, arXiv
2512.02010: of two targets of a block's largest element the better one.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from launch.reproduction.experiment import Form, Result
from launch.reproduction.plots import figure, table
from runtime.numerics.hadamard import rotate_back, signs_of
from runtime.numerics.specs import QuantSpec
from runtime.quantize.quantizer import Draw
from runtime.quantize.stateless import quantizer_of

TITLE = "Four bits"

CASTS = {
    "nearest": "nvfp4 nearest_even row",
    "stochastic": "nvfp4 stochastic row",
    "stochastic-headroom": "nvfp4:scale=headroom stochastic row",
    "four-over-six": "nvfp4:scale=four-six nearest_even row",
    "ms-eden": "nvfp4:scale=eden stochastic row hadamard128[random]",
}
_KNOWN = {"stochastic": 0.0189, "stochastic-headroom": 0.0234, "ms-eden": 0.0097}
"""Relative squared errors as others find them on 2^20 Gaussians."""
_SIZE = {"smallest": 2**12, "short": 2**20, "full": 2**20}
_DRAWS = {"smallest": 2, "short": 4, "full": 16}


def units(form: Form) -> list[str]:
    return list(CASTS)


def measure(key: str, form: Form) -> Result:
    """sum (v - x)^2 / sum x^2, and <v, x> / <x, x>, over draws of x and of the random bits."""
    found = [_once(key, _SIZE[form], seed) for seed in range(_DRAWS[form])]
    return {"error": [each[0] for each in found], "kept": [each[1] for each in found]}


def _once(key: str, size: int, seed: int) -> tuple[float, float]:
    x = torch.randn(size // 1024, 1024, generator=torch.Generator().manual_seed(seed))
    off, wide = (cast(x, QuantSpec.parse(CASTS[key]), seed).double() - x), x.double()
    energy = wide.square().sum()
    return float(off.square().sum() / energy), float(1 + (off * wide).sum() / energy)


def cast(x: Tensor, spec: QuantSpec, seed: int) -> Tensor:
    """The values of a cast, turned back where it turns."""
    draw = Draw(seed=seed, step=1, stream=2, signs=3)
    made = quantizer_of(spec).cast(x, draw)
    values = made.grid.float() if made.scale is None else made.grid.float() * made.scale
    if spec.transform is None:
        return values
    return rotate_back(values, spec, signs_of(spec.transform, seed=seed, step=1, stream=3))


def tell(results: Mapping[str, Result], form: Form, plots: Path) -> str:
    means = {key: (_mean(each["error"]), _mean(each["kept"])) for key, each in results.items()}
    with figure(plots / "four-bits.png") as axes:
        axes.bar(range(len(means)), [error for error, _ in means.values()])
        axes.set_xticks(range(len(means)), list(means), fontsize=7)
        axes.set(ylabel="relative squared error")
    rows = [[key, f"{error:.4f}", f"{kept:.4f}"] for key, (error, kept) in means.items()]
    lines = []
    for key, known in _KNOWN.items():
        if key in means:
            verdict = "reproduced" if abs(means[key][0] / known - 1) < 0.03 else "contradicted"
            lines.append(f"- {key}: {means[key][0]:.4f}, elsewhere {known}: **{verdict}**")
    if {"ms-eden", "stochastic"} <= set(means):
        error, kept = means["ms-eden"]
        verdict = "reproduced" if error < 0.55 * means["stochastic"][0] and abs(kept - 1) < 1e-3 else "contradicted"
        lines.append(f"- MS-EDEN keeps the mean at about half of the error of stochastic rounding: **{verdict}**")
    if {"nearest", "four-over-six"} <= set(means):
        verdict = "reproduced" if means["four-over-six"][0] < means["nearest"][0] else "contradicted"
        lines.append(f"- Four over six has a smaller error than one target: **{verdict}**")
    return (
        f"Mean over {_DRAWS[form]} draws of {_SIZE[form]:,} Gaussian numbers, NVFP4 along rows of 1024: the squared"
        " error over the square of the numbers, and the share of them that is in the result. Published (Quartet II):"
        " MS-EDEN has half of the error of stochastic rounding, and no bias.\n\n"
        f"{table(['cast', 'error', 'share kept'], rows)}\n\n" + "\n".join(lines)
        + f"\n\n![four bits]({plots.name}/four-bits.png)"
    )  # fmt: skip


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
