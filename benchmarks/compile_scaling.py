"""How the time and memory of recording, passes and install grow with depth: Llama-shaped models on the meta device.

    OMP_NUM_THREADS=1 python -m benchmarks.compile_scaling [--layers 2 8 32 80] [--policy hfp8]

Widths are those of Llama-2-70B. Each depth runs in a process of its own: seconds are wall time on one core, the peak is
that of the process beyond its size before the compilation. The ratio is milliseconds per layer over the smallest of
the table.
"""

import argparse
import multiprocessing
import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lpcompile import lpcompile

LLAMA_2_70B = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def measure(num_layers: int, policy: str) -> tuple[float, float, int]:
    """(seconds, MiB beyond the size before, modules with a captured forward) of one compilation."""
    config = LlamaConfig(**LLAMA_2_70B, num_hidden_layers=num_layers, use_cache=False, attn_implementation="eager")
    _compile(LlamaConfig(**LLAMA_2_70B, num_hidden_layers=1, use_cache=False, attn_implementation="eager"), policy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, num_captured = _compile(config, policy)
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, num_captured


def _compile(config: LlamaConfig, policy: str) -> tuple[float, int]:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        tokens = torch.zeros(4, 128, dtype=torch.long)
    start = time.perf_counter()
    lpcompile(model, policy, example_kwargs={"input_ids": tokens})
    seconds = time.perf_counter() - start
    return seconds, sum("_lp_captured" in vars(module) for module in model.modules())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32, 80])
    parser.add_argument("--policy", default="hfp8")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    for num_layers in options.layers:
        with context.Pool(1) as pool:
            rows.append((num_layers, *pool.apply(measure, (num_layers, options.policy))))
    fastest = min(seconds / num_layers for num_layers, seconds, _, _ in rows)
    print("| layers | seconds | ms per layer | ratio | peak MiB | captured |\n|---|---|---|---|---|---|")
    for num_layers, seconds, mib, num_captured in rows:
        each = seconds / num_layers
        print(
            f"| {num_layers} | {seconds:.2f} | {1e3 * each:.0f} | {each / fastest:.2f} | {mib:.0f} | {num_captured} |"
        )


if __name__ == "__main__":
    main()
