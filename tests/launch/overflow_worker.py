"""One of two workers: a gradient of rank 1 alone is Inf at the second step; what happened is printed as JSON by rank 0.

usage: overflow_worker.py FOLDER ENGINE[:ZERO_STAGE] ...   (with torchrun's variables in the environment)
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.training.config import RunConfig
from launch.training.trainer import Run
from launch.training.world import World, join_world
from lpcompile import load_policy
from lpcompile.api import run_state

POLICY = """
version: 1
name: scaled
rules:
  - match: {op: linear}
    bwd: {dy: e5m2}
    grad: {dy: e5m2}
loss_scale: {kind: dynamic, init: 1024}
"""


def main(folder: Path, engines: list[str]) -> None:
    base = RunConfig(
        data=str(folder / "text.txt"),
        layers=1,
        width=32,
        heads=2,
        context=16,
        batch=2,
        steps=3,
        warmup=3,
        timeout=60.0,
        device="cpu",
        eval_every=1,
    )
    with join_world(base) as world:
        told = {}
        for engine in engines:
            name, _, stage = engine.partition(":")
            config = base.model_copy(update={"engine": name, "zero_stage": int(stage or 0)})
            told[engine] = _observe(config, folder, world)
        if world.is_first:
            print(json.dumps(told))


def _observe(config: RunConfig, folder: Path, world: World) -> list[dict[str, Any]]:
    path = folder / "policy.yaml"
    if world.is_first:
        path.write_text(POLICY)
    dist.barrier()
    run = Run(config, load_policy(path), folder, world)
    poison = {"on": False}

    def hook(gradient: Tensor) -> Tensor:
        return gradient * float("inf") if poison["on"] and world.rank == 1 else gradient

    # before the trainer's own hook in the chain of this parameter, as an overflow inside backward would be
    parameter = next(run.model.parameters())
    parameter._backward_hooks = {-1: hook, **(parameter._backward_hooks or {})}
    seen = []
    for step in range(config.steps):
        poison["on"] = step == 1
        metrics = run.step(step)
        scales: list[Any] = [None] * world.size
        dist.all_gather_object(scales, [run.scale.value, run.scale.skipped, metrics.validation, metrics.loss])
        clock = int(run_state(run.model).step)  # type: ignore[union-attr]
        told = {"skipped": metrics.skipped, "overflowed": metrics.overflowed, "lr": metrics.lr, "clock": clock}
        seen.append({**told, "ranks": scales})
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
