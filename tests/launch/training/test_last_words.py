"""Last words: the rank that began it is named, a full disk is one, and what only follows is left out."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.training.last_words import WorkerError, first_cause, is_lost_peer, leave_last_words, told
from runtime.errors import LpError


def failure(code: int, message: Any = "") -> Any:
    return SimpleNamespace(exitcode=code, message=message, signal_name=lambda: "SIGKILL")


def words(error: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    leave_last_words(error, **options)
    return json.loads(path.read_text())["message"]


def test_the_rank_that_began_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:12")
    follows = words(lost, tmp_path / "0", monkeypatch, exit_code=1, follows=is_lost_peer(lost))
    began = words(KeyError("weights"), tmp_path / "1", monkeypatch, exit_code=1)
    for failures in ({0: failure(1, follows), 1: failure(1, began)}, {1: failure(1, began), 0: failure(1, follows)}):
        error = first_cause(failures, tmp_path)
        assert str(error).startswith(f"{tmp_path}: worker 1 failed: KeyError: 'weights'.")
        assert error.exit_code == 1
    killed = first_cause({0: failure(1, follows), 1: failure(-9)}, tmp_path)
    assert str(killed) == f"{tmp_path}: worker 1 was lost (signal SIGKILL)."


def test_a_sentence_is_repeated_word_by_word_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = LpError("the ranks do not run the same", where="rank 1: --seed", got="3")
    for code in (2, 1):
        said = words(sentence, tmp_path / f"{code}", monkeypatch, exit_code=code)
        error = first_cause({0: failure(code, said)}, tmp_path)
        assert (str(error), error.exit_code) == (str(sentence), code)


def test_the_first_words_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words(LpError("first"), tmp_path / "0", monkeypatch)
    assert words(LpError("second"), tmp_path / "0", monkeypatch)["message"] == "first."


def test_a_lost_worker_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-000004\n")
    assert str(first_cause({0: failure(-9)}, tmp_path)).endswith(f"Try lpcompile train --resume {tmp_path}.")


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = told(OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"))
    assert str(full).startswith("run/metrics.jsonl: the disk is full. Got No space left on device. Try making room")
    writer = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert "a file cannot be written" in str(told(writer, tmp_path))
    no_inode = RuntimeError("[enforce fail at x.cc:747] . open file failed with strerror: No space left on device")
    assert str(told(no_inode, tmp_path)).startswith(f"{tmp_path}: the disk is full. Got No space left on device")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    assert "the disk is full. Got No space left on device" in str(told(writer, tmp_path))
    assert told(KeyError("a")) is None


def test_an_error_travels_between_ranks() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(WorkerError("full", 1, where="there")))
    assert (str(error), error.exit_code, error.where) == ("there: full.", 1, "there")
