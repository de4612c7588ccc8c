"""Kills: a run whose workers are killed again and again, also in its last seconds, ends with the bits of a calm one."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.kills import kill, metrics, start, wait_for, wait_for_end, workers_of, write_text


@pytest.fixture(autouse=True)
def _a_short_text(tmp_path: Path) -> None:
    write_text(tmp_path)


def test_a_worker_lost_after_the_last_checkpoint_finishes_the_run(tmp_path: Path) -> None:
    parent = start(tmp_path, "--nproc", "1", "--steps", "4", "--out", "run", "--max-restarts", "2")
    wait_for(parent, tmp_path / "run" / "checkpoints" / "latest")
    os.kill(workers_of(parent.pid)[0], signal.SIGKILL)
    assert parent.wait() == 0, (tmp_path / "log").read_text()
    assert [step["step"] for step in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert "byte-bigram baseline" in (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.parametrize(
    "name", ["SIGKILL", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGTERM", "SIGHUP"))]
)
def test_workers_end_with_whoever_started_them(tmp_path: Path, name: str) -> None:
    """A signal that can be caught is one sentence; after kill -9 nothing is left that trains on."""
    parent = start(tmp_path, "--nproc", "2", "--steps", "100000", "--save-every", "5", "--out", "run")
    wait_for(parent, tmp_path / "run" / "checkpoints" / "latest")
    workers = workers_of(parent.pid)
    os.kill(parent.pid, signal.Signals[name])
    assert parent.wait() == (-9 if name == "SIGKILL" else 128 + signal.Signals[name])
    wait_for_end(workers)
    told = (tmp_path / "log").read_text()
    assert "Traceback" not in told
    if name != "SIGKILL":
        assert told.splitlines()[-1].startswith(f"run: stopped by {name}. Try lpcompile train --resume run.")


@pytest.mark.slow
def test_workers_whose_launcher_is_killed_while_they_start_end_too(tmp_path: Path) -> None:
    """They waited for its store until --timeout, which is five minutes."""
    parent = start(tmp_path, "--nproc", "2", "--steps", "100000", "--out", "run")
    while not (workers := workers_of(parent.pid)):
        assert parent.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    time.sleep(2)  # they import
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for_end(workers)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    """Twelve kills at random moments, eight in the last seconds; of workers and of whoever started them, in turn."""
    hits = kill(tmp_path, kills=20, last=8, seed=1, nproc=2)
    assert sum(hits.values()) == 20
    print(hits)
