"""Training step under a policy against the same step in fp32 and in bf16, on the CPU, in one run.

    python -m benchmarks.training_step [--policy hfp8] [--rounds 7] [--threads 2]

Forward, backward and AdamW of a GPT-2 from config; the contenders take turns step by step, so that a change of the
machine's speed hits all of them. Printed: median ms, the ratio to fp32, and where the time of a policy step goes by the
profiler.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks._timing import median_ms, show
from lpcompile import lpcompile


@dataclass(frozen=True)
class Shape:
    """One GPT-2 and its batch."""

    name: str
    d: int
    layers: int
    batch: int
    context: int = 128


SHAPES = (Shape("default GPT", 256, 3, 4), Shape("d=512", 512, 4, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="hfp8", help="shipped name or path (default: hfp8)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in SHAPES:
        _compare(shape, options.policy, options.rounds)


def _compare(shape: Shape, policy: str, rounds: int) -> None:
    steps = _contenders(shape, policy)
    medians = median_ms(dict(steps), rounds)
    table = Table(
        "step",
        "median ms",
        "x fp32",
        title=f"{shape.name}: {shape.layers} layers, d {shape.d}, {shape.batch} x {shape.context}",
    )
    for name, median in medians.items():
        table.add_row(name, f"{median:.1f}", f"{median / medians['fp32']:.2f}")
    show(table, _profile(steps[policy]))


def _contenders(shape: Shape, policy: str) -> dict[str, Callable[[], None]]:
    model = make_model(shape)
    tokens = torch.randint(0, 256, (shape.batch, shape.context), generator=torch.Generator().manual_seed(0))
    compiled = lpcompile(copy.deepcopy(model), policy, example_kwargs={"input_ids": tokens, "labels": tokens})
    emulated = lpcompile(copy.deepcopy(model), "fp32-emulated", example_kwargs={"input_ids": tokens, "labels": tokens})
    return {
        "fp32": _step(copy.deepcopy(model), tokens),
        "bf16 model": _step(copy.deepcopy(model).bfloat16(), tokens),
        "bf16 autocast": _step(copy.deepcopy(model), tokens, autocast=True),
        "fp32-emulated": _step(emulated, tokens),
        policy: _step(compiled, tokens),
    }


def make_model(shape: Shape) -> nn.Module:
    """A GPT-2 of bytes from its config, without dropout, the same every time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "n_embd": shape.d,
        "n_layer": shape.layers,
        "n_head": shape.d // 64,
        "n_positions": shape.context,
    }
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, use_cache=False, bos_token_id=0, eos_token_id=0, **sizes, **dropout)
    )


def _step(model: nn.Module, tokens: Tensor, autocast: bool = False) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _profile(step: Callable[[], None]) -> Table:
    """Self CPU time of a step by operator, the larger ones."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    table = Table("operator", "calls", "ms", "share", title="where the time goes")
    for event in events[:12]:
        milliseconds = event.self_cpu_time_total / 1e3
        table.add_row(event.key, str(event.count), f"{milliseconds:.1f}", f"{event.self_cpu_time_total / whole:.0%}")
    return table


if __name__ == "__main__":
    main()
