"""A step of the optimizers of runtime/optim/, as ratios over torch's fused AdamW in fp32, of the same parameters.

    python -m benchmarks.optimizers [--size 16000000] [--rounds 15] [--threads 2]

Milliseconds of a step without backward, bytes of weights and states a parameter, and the ratio. Contenders take turns
and medians are compared. limit: the bytes that a step reads and writes (weights and states both ways, the gradient
once) at the rate of torch's copy of a tensor in the same turns. torchao's optimizers are measured where it is installed
(`pip install 'lpcompile[peers]'`), after the steps in which they compile.
"""

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn

from benchmarks._timing import median_ms, show
from runtime.optim.adamw import LowPrecisionAdamW
from runtime.optim.formats import UpdateFormats
from runtime.optim.sgd import LowPrecisionSGD

BASE = "torch AdamW, fused, fp32"
COPY = "a copy"
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
    "AdamW fp32; moments e4m3 and fp16 (FP8-LM)": (
        LowPrecisionAdamW, torch.float32, UpdateFormats("fp32", "e4m3/128", "fp16")
    ),
    "AdamW fp32; moments e4m3/128": (LowPrecisionAdamW, torch.float32, UpdateFormats("fp32", "e4m3/128", "e4m3/128")),
    "AdamW fp32; moments e4m3/128/expand (COAT)": (
        LowPrecisionAdamW, torch.float32, UpdateFormats("fp32", "e4m3/128/expand", "e4m3/128/expand")
    ),
    "AdamW fp32; moments dynamic8/256": (
        LowPrecisionAdamW, torch.float32, UpdateFormats("fp32", "dynamic8/256", "dynamic8/256")
    ),
    "AdamW fp32; moments dynamic4/128": (
        LowPrecisionAdamW, torch.float32, UpdateFormats("fp32", "dynamic4/128", "dynamic4/128")
    ),
    "SGD fp32": (LowPrecisionSGD, torch.float32, UpdateFormats()),
    "SGD bf16, by chance": (LowPrecisionSGD, torch.bfloat16, UpdateFormats("bf16", "bf16", rounding=CHANCE)),
    "SGD 1-6-9, by chance": (LowPrecisionSGD, torch.float32, UpdateFormats("dlfloat16", "dlfloat16", rounding=CHANCE)),
}  # fmt: skip

PEERS: dict[str, tuple[str, torch.dtype, float, dict[str, Any]]] = {
    "torchao AdamW8bit": ("AdamW8bit", torch.float32, 6.03, {}),
    "torchao AdamW4bit": ("AdamW4bit", torch.float32, 5.06, {}),
    "torchao AdamWFp8": ("AdamWFp8", torch.float32, 6.03, {}),
    "torchao AdamW bf16, by chance": (
        "_AdamW", torch.bfloat16, 6, {"bf16_stochastic_round": True}
    ),
}  # fmt: skip
"""Class of torchao.optim, dtype of the weights, bytes a parameter, arguments."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16_000_000, help="parameters (default: 16 million)")
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each contender (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contenders, missing = _contenders(options.size)
    source, target = torch.randn(options.size), torch.empty(options.size)
    steps: dict[str, Callable[[], object]] = {name: each.step for name, each in contenders.items()}
    medians = median_ms({COPY: partial(target.copy_, source), **steps}, options.rounds)
    table = Table("a step", "bytes a parameter", "ms", "x torch's fused AdamW", "limit")
    for name, each in contenders.items():
        limit = medians[COPY] * each.moved / 8
        ratios = [f"{ms / medians[BASE]:.2f}" for ms in (medians[name], limit)]
        table.add_row(name, f"{each.held:.4g}", f"{medians[name]:.1f}", *ratios)
    show(table)
    for sentence in missing:
        print(sentence)


class Contender(NamedTuple):
    """A step, with the bytes a parameter that it keeps, and those that it reads or writes."""

    step: Callable[[], object]
    held: float
    moved: float


def _contenders(size: int) -> tuple[dict[str, Contender], list[str]]:
    """Steps by name, and a sentence for each peer that is missing."""
    found = {
        BASE: Contender(torch.optim.AdamW([_weight(size)], fused=True).step, 12, 28),
        "torch SGD with momentum, fused, fp32": Contender(
            torch.optim.SGD([_weight(size)], momentum=0.9, fused=True).step, 8, 20
        ),
    }
    for name, (kind, dtype, formats) in OURS.items():
        optimizer = kind([_weight(size, dtype)], lr=1e-3, formats=formats)
        held = optimizer.bytes_per_parameter()
        found[name] = Contender(optimizer.step, held, 2 * held + dtype.itemsize)
    try:
        package: Any = importlib.import_module("torchao.optim")
    except Exception as error:  # a peer fails in ways of its own
        return found, [f"torchao.optim is not measured: {str(error).splitlines()[0]}"]
    missing = []
    for name, (kind, dtype, held, arguments) in PEERS.items():
        optimizer = getattr(package, kind)([_weight(size, dtype)], **arguments)
        try:
            for _ in range(2):
                optimizer.step()  # here it compiles
        except Exception as error:
            missing.append(f"{name} is not measured: {str(error).splitlines()[0]}")
            continue
        found[name] = Contender(optimizer.step, held, 2 * held + dtype.itemsize)
    return found, missing


def _weight(size: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(size).to(dtype))
    weight.grad = torch.randn(size).to(dtype)
    return weight


if __name__ == "__main__":
    main()
