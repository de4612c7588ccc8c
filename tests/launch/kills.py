"""Kills: runs that are killed, resumed, and held against one that was left alone.

    python -m tests.launch.kills --kills 20 --last 8 --seed 1

kills a worker or whoever started it by SIGKILL, in turn; --last of them after the last checkpoint appeared, the others
at random moments after another. A lost worker is restarted by the launcher, a lost launcher by `--resume`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TINY = [
    *["--data", "text.txt", "--layers", "1", "--width", "32", "--heads", "2", "--context", "16", "--batch", "2"],
    *["--warmup", "2", "--eval-every", "0", "--device", "cpu", "--engine", "ddp", "--policy", "hfp8"],
]
STEPS, EVERY = 24, 4


def write_text(folder: Path) -> None:
    """A short text to train on."""
    draw = random.Random(0)
    words = ["matrix", "kernel", "gradient", "format", "scale", "round", "the", "of", "a", "is"]
    (folder / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(3300)))


def start(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "launch", "train", *TINY, *arguments]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)


def workers_of(pid: int) -> list[int]:
    """Its children; none once it is gone."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    """Of every step; those that a resumed run took again are the resumed run's."""
    resumed = run.with_name(f"{run.name}-resumed")
    again = losses(resumed) if resumed.exists() else []
    return [(step["step"], step["loss"]) for step in metrics(run) if not again or step["step"] < again[0][0]] + again


def wait_for(parent: "subprocess.Popen[bytes]", path: Path) -> None:
    while not path.exists():
        assert parent.poll() is None, path.parent
        time.sleep(0.02)


def wait_for_end(workers: list[int]) -> None:
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{each}").exists() for each in workers):
        assert time.monotonic() < deadline, "a worker trains on"
        time.sleep(0.1)


def run_with_a_kill(folder: Path, run: Path, sizes: list[str], is_last: bool, of_launcher: bool, draw: Any) -> str:
    """Train in `run`, kill once, and go on to the end, in `run`-resumed after the launcher. Says what was hit."""
    parent = start(folder, *sizes, "--out", run.name, "--max-restarts", "2")
    after = STEPS if is_last else draw.choice(range(EVERY, STEPS - EVERY, EVERY))
    wait_for(parent, run / "checkpoints" / f"step-{after:06d}")
    time.sleep(draw.random() * (1.0 if is_last else 0.3))
    workers = workers_of(parent.pid)
    hit = parent.pid if of_launcher else draw.choice(workers) if workers else None
    if hit is None or parent.poll() is not None:
        assert parent.wait() == 0, tail(folder)
        return "nothing, it had ended"
    os.kill(hit, signal.SIGKILL)
    code = parent.wait()
    if of_launcher and code == -signal.SIGKILL:
        wait_for_end(workers)
        if (run / "summary.json").exists():
            return "the launcher, the workers had done"
        code = start(folder, *sizes, "--resume", run.name, "--out", f"{run.name}-resumed").wait()
    assert code == 0, tail(folder)
    return "the launcher" if of_launcher else "a worker"


def tail(folder: Path) -> str:
    return (folder / "log").read_text()[-2000:]


def kill(folder: Path, kills: int, last: int, seed: int, nproc: int) -> dict[str, int]:
    """How many of `kills` runs, `last` of them in their last seconds, were hit, and what; all end with the bits of the
    calm one.
    """
    draw, hits = random.Random(seed), dict[str, int]()
    sizes = ["--nproc", str(nproc), "--steps", str(STEPS), "--save-every", str(EVERY), "--timeout", "60"]
    assert start(folder, *sizes, "--out", "calm").wait() == 0, tail(folder)
    calm = losses(folder / "calm")
    assert len(calm) == STEPS
    for number in range(kills):
        run, is_last = folder / f"run-{number}", number < last
        what = run_with_a_kill(folder, run, sizes, is_last, number % 2 == 1, draw)
        assert losses(run) == calm, f"run {number}: {what}"
        moment = "in the last seconds" if is_last else "in between"
        print(f"run {number}: hit {what} {moment}: the bits of the calm run", flush=True)
        hits[f"{what}, {moment}"] = hits.get(f"{what}, {moment}", 0) + 1
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--last", type=int, default=8, help="of them, how many in the last seconds of a run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nproc", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_text(Path(name))
        print(kill(Path(name), given.kills, given.last, given.seed, given.nproc))


if __name__ == "__main__":
    main()
