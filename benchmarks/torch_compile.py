"""Under torch.compile: training steps of a Llama-shaped model under a policy, against eager code and torchao.

    python -m benchmarks.torch_compile [--width 512] [--layers 4] [--batch 4] [--length 128] [--policy fp8-rowwise]
                                       [--rounds 9] [--threads 2] [--only WORD ...] [--no-update]

Contenders, which take turns, on the same weights and tokens: the original model eager and compiled; lpcompile eager
and compiled; the joint front end op by op and by Inductor; and torchao's convert_to_float8_training (emulate=True, what
runs without FP8 units) with scales per row and per tensor, compiled. Printed: seconds of the first call, median ms, and
the ratios to the original in eager code, to lpcompile in eager code and to torchao per row. `--only` keeps contenders
whose name has one of the words. A step is forward, backward and fused AdamW; with `--no-update` the weights stay, as
over the micro-batches of one step, and casts of them that eager code keeps are not made again.
"""

import argparse
import copy
import dataclasses
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._timing import median_ms, show
from lpcompile import attach, compile_joint, lpcompile
from lpcompile.compiled import find_compiled

_VOCABULARY = 2048
_EAGER, _TORCHAO = "lpcompile", "torchao rowwise, compiled"

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--policy", default="fp8-rowwise", help="shipped name or path (default: fp8-rowwise)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each contender (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--only", nargs="+", default=[], help="words of the contenders to keep")
    parser.add_argument("--no-update", action="store_true", help="forward and backward alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokens = torch.randint(0, _VOCABULARY, (options.batch, options.length))
    model = _llama(options.width, options.layers, options.length)
    makers = {
        name: make
        for name, make in _contenders(options.policy, tokens).items()
        if not options.only or any(word in name for word in options.only)
    }
    steps: dict[str, Step] = {}
    seconds: dict[str, float] = {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            steps[name] = _step(make(copy.deepcopy(model)), tokens, not options.no_update)
        except ImportError as error:
            print(f"{name} is not measured: {str(error).splitlines()[0]}")
            continue
        steps[name]()
        seconds[name] = time.perf_counter() - start
    _print(median_ms(steps, options.rounds), seconds, options)


def _llama(width: int, layers: int, length: int) -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": -(-8 * width // 3 // 64) * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            max_position_embeddings=length,
            use_cache=False,
            attn_implementation="eager",
            **sizes,
        )
    )


def _contenders(policy: str, tokens: Tensor) -> dict[str, Callable[[nn.Module], Callable[..., Any]]]:
    call = {"input_ids": tokens, "labels": tokens}
    return {
        "original": lambda model: model,
        "original, compiled": torch.compile,
        _EAGER: lambda model: lpcompile(model, policy, example_kwargs=call),
        f"{_EAGER}, compiled": lambda model: torch.compile(
            lpcompile(model, policy, example_kwargs=call), fullgraph=True
        ),
        "joint, op by op": lambda model: compile_joint(
            lpcompile(model, policy, example_kwargs=call), backend="aot_eager", fullgraph=True
        ),
        "joint, Inductor": lambda model: compile_joint(lpcompile(model, policy, example_kwargs=call), fullgraph=True),
        _TORCHAO: lambda model: torch.compile(_torchao(model, "rowwise")),
        "torchao tensorwise, compiled": lambda model: torch.compile(_torchao(model, "tensorwise")),
    }


def _torchao(model: nn.Module, recipe: str) -> nn.Module:
    float8: Any = importlib.import_module("torchao.float8")
    config = dataclasses.replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    converted: nn.Module = float8.convert_to_float8_training(model, config=config)
    return converted


def _step(model: Any, tokens: Tensor, updates: bool) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if find_compiled(model) is not None:
        attach(model, optimizer)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        if updates:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _print(medians: dict[str, float], seconds: dict[str, float], options: argparse.Namespace) -> None:
    what = "forward and backward" if options.no_update else "training step"
    table = Table(
        *(what, "first call s", "median ms", "x original", f"x {_EAGER}", "x torchao rowwise"),
        title=f"{options.policy}: {options.layers} layers, width {options.width}, {options.batch} x {options.length}, "
        f"{options.threads} threads, torch {torch.__version__}",
    )
    for name, median in medians.items():
        ratios = (f"{median / medians[to]:.2f}" if to in medians else "-" for to in ("original", _EAGER, _TORCHAO))
        table.add_row(name, f"{seconds[name]:.0f}", f"{median:.1f}", *ratios)
    show(table, width=140)


if __name__ == "__main__":
    main()
