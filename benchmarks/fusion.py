"""Fusion: what becomes a part of a product, against the same model with it apart, in one run, with the same bits.

    python -m benchmarks.fusion [--rounds 25] [--threads 1] [--rows 512]

    scales, bias      one pass over the output of a compiled linear layer, against one torch operation after another
    sum, relu, gelu   the pass `fuse`, against the pipeline without it: d -> 4 d and an activation, 4 d -> d and a sum
    batch norm        the pass `fold-batchnorm`, against the pipeline without it (other bits: the weight is another)

Evaluation mode, eager on the CPU, whole calls with their casts. Contenders take turns; printed are medians and ratios.
"""

import argparse
import copy
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks._timing import median_ms, show
from lpcompile import lpcompile
from passes.pipelines import PIPELINES
from runtime.kernels.cpu import epilogue

POLICIES = ("hfp8", "int8", "fp8-rowwise")
"""hfp8 has no scales here: its first row shows how far a ratio of equal things wanders."""
WIDTHS = (512, 768, 1024)
CHANNELS = (64, 128)


class _Up(nn.Module):
    """activation(x w), d -> 4 d."""

    def __init__(self, d: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.activation = nn.Linear(d, 4 * d), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.fc(x))


class _Residual(nn.Module):
    """x + x w, d -> d."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="timed calls of each contender (default: 25)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--rows", type=int, default=512, help="rows of the input (default: 512)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("what", "policy", "size", "apart ms", "fused ms", "apart / fused")
    for policy in POLICIES:
        for d in WIDTHS:
            x = torch.randn(options.rows, d)
            apart, fused = _one_pass(policy, x)
            _add_row(table, "scales, bias", policy, f"d {d}", apart, fused, options.rounds)
            models = {
                "relu": _Up(d, F.relu),
                "gelu": _Up(d, F.gelu),
                "silu": _Up(d, F.silu),
                "sum": _Residual(d),
            }
            for what, model in models.items():
                apart, fused = _pipelines(model, policy, x, "fuse,")
                _add_row(table, what, policy, f"d {d}", apart, fused, options.rounds)
    for policy in ("hfp8", "int8"):
        for width in CHANNELS:
            model = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            x = torch.randn(8, width, 28, 28)
            apart, fused = _pipelines(model, policy, x, "fold-batchnorm,", bound=0.2)
            _add_row(table, "batch norm, relu", policy, f"{width} channels", apart, fused, options.rounds)
    show(table)


Run = Callable[[], Tensor]


def _one_pass(policy: str, x: Tensor) -> tuple[Run, Run]:
    model = lpcompile(nn.Linear(x.shape[1], 4 * x.shape[1]), policy).eval()

    kernel = epilogue.epilogue_library

    def apart() -> Tensor:
        vars(epilogue)["epilogue_library"] = lambda: None  # mock.patch would take a tenth of the time that is measured
        try:
            return model(x)
        finally:
            vars(epilogue)["epilogue_library"] = kernel

    return apart, lambda: model(x)


def _pipelines(model: nn.Module, policy: str, x: Tensor, removed: str, bound: float = 0.0) -> tuple[Run, Run]:
    """The model compiled without a pass, and with it; what they give may differ by `bound` times the largest value."""
    model = model.eval()
    with mock.patch.dict(PIPELINES, infer=PIPELINES["infer"].replace(removed, "")):
        plain = lpcompile(copy.deepcopy(model), policy, (x,), mode="infer")
    fused = lpcompile(model, policy, (x,), mode="infer")
    with torch.no_grad():
        left, right = plain(x), fused(x)
    assert (left - right).abs().max() <= bound * left.abs().max()
    return lambda: plain(x), lambda: fused(x)


@torch.no_grad()
def _add_row(table: Table, what: str, policy: str, size: str, apart: Run, fused: Run, rounds: int) -> None:
    ms = median_ms({"apart": apart, "fused": fused}, rounds)
    ratio = ms["apart"] / ms["fused"]
    table.add_row(what, policy, size, f"{ms['apart']:.2f}", f"{ms['fused']:.2f}", f"{ratio:.2f}")


if __name__ == "__main__":
    main()
