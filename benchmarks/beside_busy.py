"""A training step alone and beside one busy process: a worker of the trainer, and torch's own loop of the same model.

The busy process is one `while True: pass`. OpenMP's threads spin where they wait; beside a process that keeps a core
busy they spin on the core that the thread they wait for needs. Workers are told to sleep instead.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

_LOOP = """
import sys, time, torch
from torch.nn.functional import cross_entropy
from launch.training.config import RunConfig
from launch.training.models.build import build_model
config = RunConfig()
model = build_model(config, vocab=256)
optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
x = torch.randint(0, 256, (config.batch, config.context))
times = []
for _ in range(int(sys.argv[1])):
    began = time.perf_counter()
    cross_entropy(model(input_ids=x).logits.flatten(0, 1), x.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(1000 * (time.perf_counter() - began))
times = sorted(times[len(times) // 4 :])
print(times[len(times) // 2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of each contender (default: 20)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contender (default: 2)")
    options = parser.parse_args()
    contenders = {"a worker of the trainer": _worker, "torch's own loop": _loop}
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            for is_beside in (False, True):
                with _busy() if is_beside else _quiet():
                    times.setdefault((name, is_beside), []).append(run(options.steps))
    print(f"{'ms per step (median)':28}{'alone':>10}{'beside one':>12}{'ratio':>8}")
    for name in contenders:
        alone, beside = median(times[name, False]), median(times[name, True])
        print(f"{name:28}{alone:10.0f}{beside:12.0f}{beside / alone:7.2f}x")


def _worker(steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--policy", "fp32", "--engine", "ddp", "--nproc", "1", "--steps", str(steps), "--eval-every", "0"]
        command = [sys.executable, "-m", "launch", "train", *arguments, "--out", f"{folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return median(json.loads(line)["ms"] for line in lines[len(lines) // 4 :])


def _loop(steps: int) -> float:
    done = subprocess.run([sys.executable, "-c", _LOOP, str(steps)], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


@contextmanager
def _quiet() -> Iterator[None]:
    yield


@contextmanager
def _busy() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    os.environ.pop("OMP_WAIT_POLICY", None)
    main()
