"""Kills: a run whose workers are killed again and again, also in its last seconds, ends with the bits of a calm one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TINY = [
    *["--data", "text.txt", "--layers", "1", "--width", "32", "--heads", "2", "--context", "16", "--batch", "2"],
    *["--warmup", "2", "--eval-every", "0", "--device", "cpu", "--engine", "ddp", "--policy", "hfp8"],
]


@pytest.fixture(autouse=True)
def _a_short_text(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["matrix", "kernel", "gradient", "format", "scale", "round", "the", "of", "a", "is"]
    (tmp_path / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(3300)))


def start(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "launch", "train", *TINY, *arguments]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)


def workers_of(pid: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(each) for each in done.stdout.split()]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for(parent: "subprocess.Popen[bytes]", path: Path) -> None:
    while not path.exists():
        assert parent.poll() is None, path.parent
        time.sleep(0.02)


def test_a_worker_lost_after_the_last_checkpoint_finishes_the_run(tmp_path: Path) -> None:
    parent = start(tmp_path, "--nproc", "1", "--steps", "4", "--out", "run", "--max-restarts", "2")
    wait_for(parent, tmp_path / "run" / "checkpoints" / "latest")
    os.kill(workers_of(parent.pid)[0], signal.SIGKILL)
    assert parent.wait() == 0, (tmp_path / "log").read_text()
    assert [step["step"] for step in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert "byte-bigram baseline" in (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGKILL"])
def test_workers_end_with_whoever_started_them(tmp_path: Path, name: str) -> None:
    """A signal that can be caught is one sentence; after kill -9 nothing is left that trains on."""
    parent = start(tmp_path, "--nproc", "1", "--steps", "100000", "--save-every", "5", "--out", "run")
    wait_for(parent, tmp_path / "run" / "checkpoints" / "latest")
    workers = workers_of(parent.pid)
    os.kill(parent.pid, signal.Signals[name])
    assert parent.wait() == (130 if name == "SIGINT" else -9)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{each}").exists() for each in workers):
        assert time.monotonic() < deadline, "a worker trains on"
        time.sleep(0.1)
    told = (tmp_path / "log").read_text()
    assert "Traceback" not in told
    if name == "SIGINT":
        assert told.splitlines()[-1].startswith("run: stopped by SIGINT. Try lpcompile train --resume run.")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    """Twelve kills at random moments, eight in the last seconds: after the last checkpoint appeared."""
    draw, survived, last = random.Random(1), 0, 0
    steps = ["--nproc", "2", "--steps", "24", "--save-every", "4", "--timeout", "60"]
    assert start(tmp_path, *steps, "--out", "calm").wait() == 0, (tmp_path / "log").read_text()
    calm = [(step["step"], step["loss"]) for step in metrics(tmp_path / "calm")]
    for number in range(20):
        run = tmp_path / f"run-{number}"
        parent = start(tmp_path, *steps, "--out", run.name, "--max-restarts", "2")
        is_last = number < 8
        wait_for(parent, run / "checkpoints" / f"step-{24 if is_last else draw.choice([4, 8, 12, 16]):06d}")
        time.sleep(draw.random() * (1.0 if is_last else 0.3))
        if workers := workers_of(parent.pid):
            os.kill(draw.choice(workers), signal.SIGKILL)
            last += is_last
        assert parent.wait() == 0, (tmp_path / "log").read_text()[-2000:]
        assert [(step["step"], step["loss"]) for step in metrics(run)] == calm, number
        survived += 1
    print(f"{survived} of 20 runs ended with the bits of the calm one; {last} of 8 were hit in the last seconds")
