"""Kept casts of weights against casting them at every use: training steps of 1 and 4 micro-batches, and inference.

    python -m benchmarks.weight_cache [--policies hfp8 fp8-rowwise] [--rounds 9] [--threads 2]

A GPT-2 from config (d 512, 4 layers) compiled by the pipeline with fold-constants and without; the two take turns, and
medians are compared. First what the check costs: the fingerprint of a weight against casts of it.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Literal
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks._timing import median_ms, show
from lpcompile import attach, lpcompile, report
from passes.pipelines import PIPELINES
from runtime.kernels.cpu.fingerprint import fingerprint
from runtime.numerics.specs import QuantSpec
from runtime.ops.layer import cast

WIDTH, LAYERS, ROWS, CONTEXT = 512, 4, 4, 128
WEIGHTS = ((WIDTH, WIDTH), (4 * WIDTH, WIDTH), (8 * WIDTH, 4 * WIDTH))
CASTS = ("bf16 nearest_even", "e4m3 nearest_even", "e4m3 nearest_even row/amax", "mxfp8 nearest_even row")
Mode = Literal["train", "infer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["hfp8", "fp8-rowwise"],
        help="shipped names or paths (default: hfp8 fp8-rowwise)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each contender (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    show(_checks(options.rounds), _models(options.policies, options.rounds))


def _checks(rounds: int) -> Table:
    table = Table("weight", "fingerprint us", *(f"x cast {name}" for name in CASTS), title="the check against the cast")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in WEIGHTS:
            w = torch.randn(shape).to(dtype)
            contenders: dict[str, Callable[[], object]] = {
                name: lambda w=w, name=name: cast(w, QuantSpec.parse(name), None, 0, 0) for name in CASTS
            }
            medians = median_ms({"check": lambda w=w: fingerprint(w), **contenders}, rounds)
            ratios = (f"{medians['check'] / medians[name]:.2f}" for name in CASTS)
            table.add_row(f"{shape[0]} x {shape[1]} {dtype}", f"{1e3 * medians['check']:.0f}", *ratios)
    return table


def _models(policies: list[str], rounds: int) -> Table:
    table = Table(
        "policy", "what", "ms without", "ms with", "with / without", "kept MB",
        title=f"GPT-2, {LAYERS} layers, d {WIDTH}, {ROWS} x {CONTEXT} per micro-batch",
    )  # fmt: skip
    for policy in policies:
        for micro_batches in (1, 4):
            runs, peak = _training(policy, micro_batches)
            _add(table, policy, f"step, {micro_batches} micro-batches", median_ms(runs, rounds), peak)
        for rows, context in ((ROWS, CONTEXT), (1, 1)):
            runs, peak = _inference(policy, rows, context)
            _add(table, policy, f"forward, {rows} x {context}", median_ms(runs, rounds), peak)
    return table


def _add(table: Table, policy: str, what: str, medians: dict[str, float], peak: list[int]) -> None:
    ratio = medians["with"] / medians["without"]
    megabytes = f"{max(peak) / 1e6:.1f}"
    table.add_row(policy, what, f"{medians['without']:.1f}", f"{medians['with']:.1f}", f"{ratio:.2f}", megabytes)


def _training(policy: str, micro_batches: int) -> tuple[dict[str, Callable[[], object]], list[int]]:
    peak: list[int] = []

    def step_of(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        attach(model, optimizer)

        def step() -> None:
            for _ in range(micro_batches):
                model(input_ids=tokens, labels=tokens).loss.backward()
            peak.append(report(model).kept_bytes)
            optimizer.step()
            optimizer.zero_grad()

        return step

    tokens = _tokens(ROWS, CONTEXT)
    return {name: step_of(model) for name, model in _pair(policy, "train", tokens).items()}, peak


def _inference(policy: str, rows: int, context: int) -> tuple[dict[str, Callable[[], object]], list[int]]:
    peak: list[int] = []
    tokens = _tokens(rows, context)

    def forward_of(model: nn.Module) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                model(input_ids=tokens)
            peak.append(report(model).kept_bytes)

        return forward

    return {name: forward_of(model.eval()) for name, model in _pair(policy, "infer", tokens).items()}, peak


def _pair(policy: str, mode: Mode, tokens: Tensor) -> dict[str, nn.Module]:
    model = _model()
    if mode == "infer":
        model.eval()
    example = {"input_ids": tokens, "labels": tokens} if mode == "train" else {"input_ids": tokens}
    without = {name: text.partition(",fold-constants")[0] for name, text in PIPELINES.items()}
    with mock.patch.dict(PIPELINES, without):
        uncached = lpcompile(copy.deepcopy(model), policy, example_kwargs=example, mode=mode)
    return {"without": uncached, "with": lpcompile(model, policy, example_kwargs=example, mode=mode)}


def _model() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_embd=WIDTH, n_layer=LAYERS, n_head=WIDTH // 64, n_positions=CONTEXT, use_cache=False,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _tokens(rows: int, context: int) -> Tensor:
    return torch.randint(0, 256, (rows, context), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
