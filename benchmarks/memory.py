"""Memory: what a training step adds to the peak, and what forward keeps for backward of it.

    python -m benchmarks.memory [--rows 4096] [--layers 6] [--width 1024] [--no-joint] [--rounds 5]

Six GELU MLPs of 1024 x 4096 on 4096 rows. Each case is a process of its own: after one step that warms up, and without
gradients, the peak of resident memory over one step (VmHWM of /proc, set back before it) less what is resident before
it, gradients included; and the bytes that autograd's saved-tensor hooks see, parameters left out, each storage once.
Step times are those of `keep: grid` and `keep: codes` by turns in one process, medians. Linux only.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lpcompile import Policy, compile_joint, load_policy, lpcompile

CASES = ("fp32", "bf16 model", "hfp8 grid", "hfp8 codes", "mxfp4 grid", "mxfp4 codes")


def policy(name: str, keep: str) -> Policy:
    """hfp8 is e4m3 forward and e5m2 gradients in every layer, fp32 sums; mxfp4 the same format in all."""
    x, dy = ("e4m3", "e5m2") if name == "hfp8" else (name, name)
    rule = {"fwd": {"x": x, "w": x}, "bwd": {"dy": dy, "w": x}, "grad": {"dy": dy, "x": x}}
    return load_policy(Policy.model_validate({"version": 1, "name": name, "rules": [rule], "keep": keep}))


def stack(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    n = args.width
    return nn.Sequential(
        *(each for _ in range(args.layers) for each in (nn.Linear(n, 4 * n), nn.GELU(), nn.Linear(4 * n, n)))
    )


def build(case: str, is_joint: bool, args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    model, x = stack(args), torch.randn(args.rows, args.width)
    name, _, keep = case.partition(" ")
    if case == "bf16 model":
        model, x = model.bfloat16(), x.bfloat16()
    if keep in ("grid", "codes"):
        model = lpcompile(model, policy(name, keep))
        return (compile_joint(model) if is_joint else model), x
    if is_joint:
        model.compile()
    return model, x


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def status(key: str) -> int:
    """Of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}: this benchmark is for Linux")


def settle(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(case: str, is_joint: bool, args: argparse.Namespace) -> dict[str, float]:
    model, x = build(case, is_joint, args)
    step(model, x)
    settle(model)
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), x)}
    saved: dict[int, int] = {}

    def note(each: Tensor) -> Tensor:
        storage = each.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return each

    with torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        y = model(x)
    del y
    settle(model)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(model, x)
    return {"peak": (status("VmHWM") - before) / 2**20, "saved": sum(saved.values()) / 2**20}


def times(name: str, is_joint: bool, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step by `keep`, by turns."""
    models = {keep: build(f"{name} {keep}", is_joint, args) for keep in ("grid", "codes")}
    seconds: dict[str, list[float]] = {keep: [] for keep in models}
    for number in range(args.rounds + 1):
        for keep, (model, x) in models.items():
            begin = time.perf_counter()
            step(model, x)
            if number:
                seconds[keep].append(time.perf_counter() - begin)
            model.zero_grad(set_to_none=True)
    ratios = [codes / grid for grid, codes in zip(seconds["grid"], seconds["codes"])]
    return {"grid": median(seconds["grid"]), "codes": median(seconds["codes"]), "ratio": median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a training step by what is kept for backward.")
    for option, default in (("rows", 4096), ("layers", 6), ("width", 1024), ("rounds", 5)):
        parser.add_argument(f"--{option}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--no-joint", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        what, front, case = json.loads(args.only)
        warnings.simplefilter("ignore")
        run: Callable[..., Any] = {"measure": measure, "times": times}[what]
        print(json.dumps(run(case, front == "joint", args)))
        return
    fronts = ("eager",) if args.no_joint else ("eager", "joint")
    base = 0.0
    print(f"{args.layers} MLPs of {args.width} x {4 * args.width}, {args.rows} rows; MiB")
    for front in fronts:
        for case in CASES:
            found = alone(args, "measure", front, case)
            base = base or found["peak"]
            share = found["peak"] / base
            print(
                f"{front:<6} {case:<12} peak {found['peak']:7.0f}  {share:5.2f} x fp32  kept {found['saved']:7.1f}",
                flush=True,
            )
        for name in ("hfp8", "mxfp4"):
            found = alone(args, "times", front, name)
            print(
                f"{front:<6} {name:<12} step: grid {found['grid']:.2f} s, codes {found['codes']:.2f} s; "
                f"codes / grid, median of rounds {found['ratio']:.3f}",
                flush=True,
            )


def alone(args: argparse.Namespace, *what: str) -> dict[str, float]:
    """In a process of its own."""
    sizes = [f"--{key}={getattr(args, key)}" for key in ("rows", "layers", "width", "rounds")]
    command = [sys.executable, "-m", "benchmarks.memory", *sizes, "--only", json.dumps(what)]
    # blocks of 1 MiB and more go back when they are freed: what glibc would hold on to is no part of a step
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if what[0] == "measure" else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(what)}:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
