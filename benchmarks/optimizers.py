"""A step of the optimizers of runtime/optim/, as ratios over torch's fused AdamW in fp32, of the same parameters.

    python -m benchmarks.optimizers [--size 16000000] [--rounds 15] [--threads 2]

Milliseconds of a step without backward, bytes of weights and states a parameter, and the ratio. Contenders take turns
and medians are compared. torchao's AdamW with 8-bit states is measured where it is installed
(`pip install 'lpcompile[peers]'`).
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import nn

from benchmarks._timing import median_ms, show
from runtime.optim.adamw import LowPrecisionAdamW
from runtime.optim.formats import UpdateFormats
from runtime.optim.sgd import LowPrecisionSGD

BASE = "torch AdamW, fused, fp32"
CHANCE = "stochastic"
OURS: dict[str, tuple[Any, torch.dtype, UpdateFormats]] = {
    "AdamW fp32": (LowPrecisionAdamW, torch.float32, UpdateFormats()),
    "AdamW bf16, by chance, no master; moments fp32": (
        LowPrecisionAdamW, torch.bfloat16, UpdateFormats("bf16", rounding=CHANCE)
    ),
    "AdamW bf16, by chance, no master; moments bf16": (
        LowPrecisionAdamW, torch.bfloat16, UpdateFormats("bf16", "bf16", "bf16", CHANCE)
    ),
    "AdamW bf16+16; moments fp32": (LowPrecisionAdamW, torch.bfloat16, UpdateFormats("bf16+16")),
    "AdamW bf16+16; moments bf16, by chance": (
        LowPrecisionAdamW, torch.bfloat16, UpdateFormats("bf16+16", "bf16", "bf16", CHANCE)
    ),
    "SGD fp32": (LowPrecisionSGD, torch.float32, UpdateFormats()),
    "SGD bf16, by chance": (LowPrecisionSGD, torch.bfloat16, UpdateFormats("bf16", "bf16", rounding=CHANCE)),
    "SGD 1-6-9, by chance": (LowPrecisionSGD, torch.float32, UpdateFormats("dlfloat16", "dlfloat16", rounding=CHANCE)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16_000_000, help="parameters (default: 16 million)")
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each contender (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contenders, held, missing = _contenders(options.size)
    medians = median_ms(contenders, options.rounds)
    table = Table("a step", "bytes a parameter", "ms", "x torch's fused AdamW")
    for name, median in medians.items():
        table.add_row(name, held[name], f"{median:.1f}", f"{median / medians[BASE]:.2f}")
    show(table)
    for sentence in missing:
        print(sentence)


def _contenders(size: int) -> tuple[dict[str, Callable[[], object]], dict[str, str], list[str]]:
    """Steps by name, what they hold, and a sentence for each peer that is missing."""
    steps: dict[str, Callable[[], object]] = {BASE: torch.optim.AdamW([_weight(size)], fused=True).step}
    held = {BASE: "12"}
    steps["torch SGD with momentum, fused, fp32"] = torch.optim.SGD([_weight(size)], momentum=0.9, fused=True).step
    held["torch SGD with momentum, fused, fp32"] = "8"
    for name, (kind, dtype, formats) in OURS.items():
        optimizer = kind([_weight(size, dtype)], lr=1e-3, formats=formats)
        steps[name], held[name] = optimizer.step, f"{optimizer.bytes_per_parameter():g}"
    try:
        package: Any = importlib.import_module("torchao.optim")
        steps["torchao AdamW8bit"] = package.AdamW8bit([_weight(size)]).step
        held["torchao AdamW8bit"] = "6"
        steps["torchao AdamW8bit"]()
        return steps, held, []
    except Exception as error:  # a peer fails in ways of its own
        steps.pop("torchao AdamW8bit", None)
        return steps, held, [f"torchao.optim is not measured: {str(error).splitlines()[0]}"]


def _weight(size: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(size).to(dtype))
    weight.grad = torch.randn(size).to(dtype)
    return weight


if __name__ == "__main__":
    main()
