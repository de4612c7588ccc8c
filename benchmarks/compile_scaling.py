"""What compiling costs: time and memory of lpcompile with depth, and what looking at products costs in a step.

    OMP_NUM_THREADS=1 python -m benchmarks.compile_scaling [--layers 2 8 32 80] [--policy hfp8]

First table: Llama-shaped models on the meta device, widths of Llama-2-70B (80 layers: 69 B parameters). Each depth runs
in a process of its own, after one layer has been compiled there; seconds are wall time of lpcompile with an example
call, the peak is what the process grew by. A layer's cost is the slope between two depths: ms and MiB per further
layer, and the ms over the smallest of the table. Second table: forward and backward of a GPT-2 of 2 layers, width 256,
batch 1, length 64 (eager): the original; under policy `fp32`, which touches nothing; and with the products of attention
named as fp32, so that all they do is pass through the mode. Medians of turns, and the ratio to the original.
"""

import argparse
import copy
import itertools
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks._timing import median_ms, show
from lpcompile import Policy, lpcompile

LLAMA_2_70B = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def measure(num_layers: int, policy: str) -> tuple[float, float, int, float]:
    """(seconds, MiB beyond the size before, modules with a record of ours, 1e9 parameters) of one compilation."""
    _compile(_llama(1), policy)
    model = _llama(num_layers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = _compile(model, policy)
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    num_captured = sum("_lp_captured" in vars(module) for module in model.modules())
    return seconds, mib, num_captured, sum(parameter.numel() for parameter in model.parameters()) / 1e9


def _llama(num_layers: int) -> nn.Module:
    config = LlamaConfig(**LLAMA_2_70B, num_hidden_layers=num_layers, use_cache=False, attn_implementation="eager")
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def _compile(model: nn.Module, policy: str) -> float:
    tokens = torch.zeros(4, 128, dtype=torch.long, device="meta")
    start = time.perf_counter()
    lpcompile(model, policy, example_kwargs={"input_ids": tokens})
    return time.perf_counter() - start


def print_scaling(depths: list[int], policy: str) -> None:
    context = multiprocessing.get_context("spawn")
    rows = []
    for num_layers in depths:
        with context.Pool(1) as pool:
            rows.append((num_layers, *pool.apply(measure, (num_layers, policy))))
    slopes = [
        (1e3 * (now[1] - then[1]) / (now[0] - then[0]), (now[2] - then[2]) / (now[0] - then[0]))
        for then, now in itertools.pairwise(rows)
    ]
    print(
        "| layers | 1e9 parameters | seconds | ms per layer in all | ms per further layer | over the least |"
        " peak MiB | MiB per further layer | modules |\n|---|---|---|---|---|---|---|---|---|"
    )
    least = min((slope for slope, _ in slopes), default=0.0)
    further = ["- | - |", *(f"{slope:.0f} | {slope / least:.2f} |" for slope, _ in slopes)]
    grown = ["-", *(f"{mib:.2f}" for _, mib in slopes)]
    for (num_layers, seconds, mib, num_captured, size), time_cells, mib_cell in zip(rows, further, grown):
        print(
            f"| {num_layers} | {size:.1f} | {seconds:.2f} | {1e3 * seconds / num_layers:.0f} | {time_cells}"
            f" {mib:.0f} | {mib_cell} | {num_captured} |"
        )


def print_interception(rounds: int = 200) -> None:
    config = GPT2Config(n_embd=256, n_layer=2, n_head=4, n_positions=64, vocab_size=512, use_cache=False)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    original = GPT2LMHeadModel(config)
    tokens = torch.randint(0, 512, (1, 64))
    call = {"input_ids": tokens, "labels": tokens}
    untouched = lpcompile(copy.deepcopy(original), "fp32", example_kwargs=call)
    rule = {"match": {"op": "matmul"}, "fwd": {"x": "fp32", "w": "fp32"}}
    named = Policy.model_validate({"version": 1, "name": "attention", "rules": [rule]})
    intercepted = lpcompile(copy.deepcopy(original), named, example_kwargs=call, strict=True)
    models = {"original": original, "policy fp32": untouched, "attention named as fp32": intercepted}

    def step(model: nn.Module) -> Callable[[], object]:
        return lambda: model(**call).loss.backward()

    times = median_ms({name: step(model) for name, model in models.items()}, rounds, warmups=10)
    print("\n| forward and backward | ms | ratio |\n|---|---|---|")
    for name, milliseconds in times.items():
        print(f"| {name} | {milliseconds:.3f} | {milliseconds / times['original']:.3f} |")
    show()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32, 80])
    parser.add_argument("--policy", default="hfp8")
    options = parser.parse_args()
    print_scaling(options.layers, options.policy)
    print_interception()


if __name__ == "__main__":
    main()
