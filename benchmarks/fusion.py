"""Fusion: what a GEMM's epilogue costs in one pass over the output, against one torch operation after another.

    python -m benchmarks.fusion [--rounds 25] [--threads 1] [--rows 512]

A compiled linear layer in evaluation mode, d -> 4 d, eager on the CPU, whole call with its casts. The contenders take
turns; printed are medians and ratios. The bits are the same, which is checked first.
"""

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks._timing import median_ms
from lpcompile import lpcompile
from runtime.kernels.cpu import epilogue

POLICIES = ("int8", "fp8-rowwise")
WIDTHS = (512, 768, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="timed calls of each contender (default: 25)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--rows", type=int, default=512, help="rows of the input (default: 512)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("policy", "d", "apart ms", "fused ms", "apart / fused", title="scales and bias after a linear layer")
    for policy in POLICIES:
        for d in WIDTHS:
            apart, fused = _compare(policy, d, options.rows, options.rounds)
            table.add_row(policy, str(d), f"{apart:.2f}", f"{fused:.2f}", f"{apart / fused:.2f}")
    Console().print(table)


@torch.no_grad()
def _compare(policy: str, d: int, rows: int, rounds: int) -> tuple[float, float]:
    torch.manual_seed(0)
    model, x = lpcompile(nn.Linear(d, 4 * d), policy).eval(), torch.randn(rows, d)

    def apart() -> Tensor:
        with mock.patch.object(epilogue, "epilogue_library", return_value=None):
            return model(x)

    def fused() -> Tensor:
        return model(x)

    assert torch.equal(apart(), fused())
    contenders: dict[str, Callable[[], object]] = {"apart": apart, "fused": fused}
    medians = median_ms(contenders, rounds)
    return medians["apart"], medians["fused"]


if __name__ == "__main__":
    main()
