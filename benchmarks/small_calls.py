"""What a call costs beside its work: linear layers so small that Python is most of their time, over torch's own.

    python -m benchmarks.small_calls [--policies hfp8 fp8-rowwise int8] [--rounds 15] [--threads 1]

Microseconds of torch's layer, then each policy as a ratio over it: inference (evaluation mode, no_grad), and forward
and backward with gradients of input, weight and bias. Contenders take turns; a turn is 100 calls, and medians are
compared. Sizes are batch x in -> out; the last is past the border of runtime/ops/small.py.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from rich.table import Table
from torch import nn

from benchmarks._timing import median_ms, show
from lpcompile import lpcompile

SIZES = ((1, 8, 8), (4, 32, 32), (16, 64, 64), (32, 128, 128), (64, 256, 256))
CALLS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["hfp8", "fp8-rowwise", "int8"], help="shipped names or paths")
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each contender (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("what", "size", "nn.Linear us", *(f"{policy}, x" for policy in options.policies))
    for what, turn in (("inference", _inference), ("forward, backward", _training)):
        for size in SIZES:
            table.add_row(what, "{} x {} -> {}".format(*size), *_row(turn, size, options.policies, options.rounds))
    show(table)


def _row(
    turn: Callable[..., Callable[[], None]], size: tuple[int, int, int], policies: list[str], rounds: int
) -> list[str]:
    batch, num_in, num_out = size
    layer = nn.Linear(num_in, num_out).eval()
    models = {"": layer, **{policy: lpcompile(copy.deepcopy(layer), policy) for policy in policies}}
    medians = median_ms({name: turn(model, batch, num_in) for name, model in models.items()}, rounds)
    base = medians.pop("")
    return [f"{1e3 * base / CALLS:.1f}", *(f"{median / base:.2f}" for median in medians.values())]


def _inference(model: nn.Module, batch: int, num_in: int) -> Callable[[], None]:
    x = torch.randn(batch, num_in)

    def turn() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                model(x)

    return turn


def _training(model: nn.Module, batch: int, num_in: int) -> Callable[[], None]:
    x = torch.randn(batch, num_in, requires_grad=True)
    dy = torch.randn_like(model(x))

    def turn() -> None:
        for _ in range(CALLS):
            model(x).backward(dy)

    return turn


if __name__ == "__main__":
    main()
