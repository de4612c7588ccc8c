"""Delayed scales against current ones: te-delayed and te-current, on the CPU, in one run.

    python -m benchmarks.delayed_scales [--rounds 31] [--threads 2] [--clock cpu]

Forward and backward of a Linear of 512 features on 512 rows, and a step (with AdamW) of the default GPT. The contenders
take turns; the end of a step, which moves the delayed scales, is timed with it. A current scale reads a tensor twice,
for its maximum and for the cast; a delayed one reads it once. `--clock cpu` takes the processor's time of this process,
which what else runs on the machine changes less.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.table import Table
from torch import nn

from benchmarks._timing import show
from benchmarks.training_step import SHAPES, make_model
from lpcompile import advance, lpcompile

SIZE, SHAPE = 512, SHAPES[0]
POLICIES = ("te-current", "te-delayed")
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="timed steps of each contender (default: 31)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="which time (default: wall)")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    table = Table("what", *POLICIES, "ratio, median of turns", "least over least", title="ms")
    for name, make in ((f"Linear {SIZE}, {SIZE} rows", _linear), (f"{SHAPE.name}, a step", _gpt)):
        steps = [make(policy) for policy in POLICIES]
        times = _in_turns(steps, options.rounds, clock)
        ratio = statistics.median(delayed / current for current, delayed in zip(*times))
        least = min(times[1]) / min(times[0])
        table.add_row(name, *(f"{statistics.median(each):.2f}" for each in times), f"{ratio:.2f}", f"{least:.2f}")
    show(table)


def _in_turns(steps: list[Step], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Milliseconds of each turn of each."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 3):
        for number, step in enumerate(steps):
            start = clock()
            step()
            if turn >= 3:
                times[number].append(1e3 * (clock() - start))
    return times


def _linear(policy: str) -> Step:
    torch.manual_seed(0)
    model = lpcompile(nn.Sequential(nn.Linear(SIZE, SIZE)), policy)
    x, dy = torch.randn(SIZE, SIZE, requires_grad=True), torch.randn(SIZE, SIZE)

    def step() -> None:
        model(x).backward(dy)
        with torch.no_grad():  # as an optimizer does: no cast of the weight is kept from the step before
            for parameter in model.parameters():
                parameter.mul_(0.999)
                parameter.grad = None
        x.grad = None
        advance(model)

    return step


def _gpt(policy: str) -> Step:
    tokens = torch.randint(0, 256, (SHAPE.batch, SHAPE.context), generator=torch.Generator().manual_seed(0))
    model = lpcompile(make_model(SHAPE), policy, example_kwargs={"input_ids": tokens, "labels": tokens})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(model)

    return step


if __name__ == "__main__":
    main()
