"""What compiling costs: time and memory of lpcompile with depth, and what looking at products costs in a step.

    OMP_NUM_THREADS=1 python -m benchmarks.compile_scaling [--layers 2 8 32 80] [--policy hfp8] [--rounds 200]

First table: Llama-shaped models on the meta device, widths of Llama-2-70B (80 layers: 69 B parameters). Each depth runs
in a process of its own, after one layer has been compiled there; ms are the process's CPU time in lpcompile, by leaves
alone and with an example call besides; the peak is what the process grew by. A layer's cost is the slope between two
depths: ms and MiB per further layer. Second table: forward and backward of a GPT-2 of 2 layers, width 256, batch 1,
length 64 (eager): the original; under policy `fp32`, which touches nothing; and with the products of attention named as
fp32, so that all they do is pass through the mode. Medians of turns, and the ratio to the original.
"""

import argparse
import copy
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Cost:
    """Of compiling one model."""

    layers: int
    parameters: int
    modules: int
    """With a record of ours."""
    leaves_ms: float
    example_ms: float
    mib: float
    """Beyond the size of the process before."""


def measure(num_layers: int, policy: str) -> Cost:
    tokens = torch.zeros(4, 128, dtype=torch.long, device="meta")
    example = {"example_kwargs": {"input_ids": tokens}}
    lpcompile(_llama(1), policy)
    lpcompile(_llama(1), policy, **example)
    models = _llama(num_layers), _llama(num_layers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    leaves_ms = _cpu_ms(lambda: lpcompile(models[0], policy))
    example_ms = _cpu_ms(lambda: lpcompile(models[1], policy, **example))
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    modules = sum("_lp_captured" in vars(module) for module in models[1].modules())
    parameters = sum(parameter.numel() for parameter in models[1].parameters())
    return Cost(num_layers, parameters, modules, leaves_ms, example_ms, mib)


def _llama(num_layers: int) -> nn.Module:
    config = LlamaConfig(**LLAMA_2_70B, num_hidden_layers=num_layers, use_cache=False, attn_implementation="eager")
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def _cpu_ms(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def print_scaling(depths: list[int], policy: str) -> None:
    context = multiprocessing.get_context("spawn")
    costs = []
    for num_layers in depths:
        with context.Pool(1) as pool:
            costs.append(pool.apply(measure, (num_layers, policy)))
    print(
        "| layers | 1e9 params | modules | ms by leaves | per further layer | ms with an example | per further layer |"
        " peak MiB | per further layer |\n|---|---|---|---|---|---|---|---|---|"
    )
    for then, now in zip([None, *costs], costs):
        cells = [str(now.layers), f"{now.parameters / 1e9:.1f}", str(now.modules)]
        for name in ("leaves_ms", "example_ms", "mib"):
            value = getattr(now, name)
            slope = "-" if then is None else f"{(value - getattr(then, name)) / (now.layers - then.layers):.2f}"
            cells += [f"{value:.0f}", slope]
        print(f"| {' | '.join(cells)} |")


def print_interception(rounds: int) -> None:
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
    parser.add_argument("--rounds", type=int, default=200, help="timed steps of each contender (default: 200)")
    options = parser.parse_args()
    print_scaling(options.layers, options.policy)
    print_interception(options.rounds)


if __name__ == "__main__":
    main()
