"""What telemetry costs: the default GPT's step with and without, and over 50 steps at every=50.

    python -m benchmarks.telemetry [--rounds 9] [--policy hfp8] [--sample 8192] [--whole 0] [--threads 1]

A step without telemetry, one between two that are looked at, and one that is looked at take turns; medians are
compared. What 50 steps cost more is (looked at - without) / 50; "between" shows what is left when nobody looks.
`--whole N` also times N turns of 50 real steps each way. Goal: at most 5%, and nothing between.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.table import Table
from torch.nn.functional import cross_entropy

from benchmarks._timing import median_ms, show
from launch.training.config import RunConfig
from launch.training.models.build import build_model
from lpcompile import LossScaler, attach, lpcompile, make_optimizer, telemetry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each (default: 9)")
    parser.add_argument("--policy", default="hfp8", help="a policy (default: hfp8)")
    parser.add_argument("--sample", type=int, default=8192, help="elements of each tensor (default: 8192)")
    parser.add_argument("--whole", type=int, default=0, help="turns of 50 real steps each way (default: none)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    step, model = _training(options.policy)

    def looked(every: int) -> Callable[[], None]:
        def run() -> None:
            with telemetry(model, every=every, sample=options.sample):
                step()

        return run

    medians = median_ms({"without": step, "between": looked(10**9), "looked at": looked(1)}, options.rounds, 3)
    without = medians["without"]
    fifty = (medians["looked at"] / without - 1) / 50
    table = Table("a step", "ms", "x without")
    for name, each in medians.items():
        table.add_row(name, f"{each:.1f}", f"{each / without:.3f}")
    table.add_row("50 steps, every=50", f"{50 * without * (1 + fifty):.0f}", f"{1 + fifty:.3f}")
    if options.whole:
        ratios = [_fifty(step, model, options.sample) for _ in range(options.whole)]
        table.add_row(f"50 real steps, median of {options.whole}", "", f"{median(ratios):.3f}")
    show(table)


def _fifty(step: Callable[[], None], model: torch.nn.Module, sample: int) -> float:
    """Seconds of 50 steps with telemetry over those of 50 without, a step of each in turn."""
    times = [0.0, 0.0]
    for number in range(50):
        for watches in (False, True):
            t = telemetry(model, every=1 if number == 0 else 10**9, sample=sample) if watches else None
            began = time.perf_counter()
            step()
            times[watches] += time.perf_counter() - began
            if t:
                t.close()
    return times[1] / times[0]


def _training(policy: str) -> tuple[Callable[[], None], torch.nn.Module]:
    """A step of the default run."""
    config = RunConfig(policy=policy)
    model = build_model(config, vocab=256)
    x_BT = torch.randint(0, 256, (config.batch, config.context))
    lpcompile(model, policy, example_kwargs={"input_ids": x_BT})
    optimizer, scaler = make_optimizer(model, "adamw", lr=config.lr), LossScaler(model)
    attach(model, optimizer)

    def step() -> None:
        loss = cross_entropy(model(input_ids=x_BT).logits.flatten(0, 1), x_BT.flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step()  # the clock leaves 0, which is a multiple of every number
    return step, model


if __name__ == "__main__":
    main()
