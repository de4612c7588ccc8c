"""The launcher: its workers' threads sleep where they wait, and what ends it is one sentence with a way to go on."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from launch.training import launcher
from launch.training.config import RunConfig
from launch.training.last_words import WorkerError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments that workers would have been started with."""
    environments: list[dict[str, str]] = []

    def elastic_launch(settings: Any, executable: str) -> Any:
        return lambda *_: environments.append(dict(os.environ))

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return environments


def test_threads_of_workers_sleep_where_they_wait(
    tmp_path: Path, started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    launcher._run_workers(RunConfig(nproc=2), tmp_path)
    assert (started[0]["OMP_NUM_THREADS"], started[0]["OMP_WAIT_POLICY"]) == ("4", "passive")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    launcher._run_workers(RunConfig(nproc=2), tmp_path)
    assert started[1]["OMP_WAIT_POLICY"] == "active", "what a user says stays"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_signal_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, saved: bool) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def elastic_launch(settings: Any, executable: str) -> Any:
        def start(*_: str) -> None:
            raise SignalException("death signal", signal.Signals[name])

        return start

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    if saved:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "latest").write_text("step-000004\n")
    with pytest.raises(WorkerError) as caught:
        launcher._run_workers(RunConfig(nproc=1), tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: stopped by {name}. Try ")
    assert (f"lpcompile train --resume {tmp_path}" in str(caught.value)) is saved
    assert caught.value.exit_code == 128 + signal.Signals[name]
