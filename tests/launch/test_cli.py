"""The command line: what a user gets wrong is one sentence on stderr and exit code 2, without a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import run

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--batch", "2", "--steps", "2"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused; its one sentence."""
    assert run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith(".\n")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--policy", "hfp9"], "hfp9"),
        (["--policy", "no-such.yaml"], "no-such.yaml"),
        (["--compare", "hfp9"], "hfp9"),
        (["--width", "wide"], "--width: this value does not fit. Expected a valid integer"),
        (["--heads", "3"], "width (256) must be a multiple of heads (3)"),
        (["--model", "bert"], "--model: this value does not fit. Expected 'gpt' or 'llama'. Got 'bert'"),
        (["--engine", "fsdp"], "--engine: this value does not fit"),
        (["--zero-stage", "4"], "--zero-stage: this value does not fit"),
        (["--data", "no-such-file"], "--data no-such-file: the corpus cannot be read"),
        (["--tokenizer", "no-such-folder"], "--tokenizer no-such-folder: there is no such folder"),
        (["--vocab", "7"], "vocab: the vocabulary is too small"),
        (["--config", "no-such.yaml"], "no-such.yaml: this config file cannot be read"),
        (["--resume", "nowhere"], "--resume nowhere: there is no such folder"),
        (["--resume", "."], "--resume .: this folder holds no checkpoint"),
        (["--no-such-flag"], "No such option: --no-such-flag"),
        (["--nproc", "0"], "--nproc: this value does not fit"),
    ],
)
def test_train_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert sentence in refuse(capsys, "train", *arguments)
    assert not Path("runs").exists()


def test_train_refuses_a_folder_that_is_not_empty(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "this folder is not empty" in refuse(capsys, "train", "--out", str(tmp_path))
    assert "something else than a run" in refuse(capsys, "train", "--out", str(tmp_path), "--overwrite")
    assert (tmp_path / "thesis.txt").exists()


def test_train_under_torchrun_counts_its_workers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert "has set the number of workers. Expected 4" in refuse(capsys, "train", "--policy", "fp32", "--nproc", "2")


def test_under_torchrun_only_rank_0_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert run(["train", "--policy", "hfp9"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verb", ["quantize", "search", "export", "reproduce"])
def test_planned_verbs_are_refused_by_name(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert f'"{verb}"' in refuse(capsys, verb, "--any", "thing")


def test_an_unknown_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "trian" in refuse(capsys, "trian")


def test_bench_refuses_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "bench" in refuse(capsys, "bench", "no-such-benchmark")


@pytest.mark.parametrize("verb", ["train", "bench"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert run([verb, "--help"]) == 0
    assert f"lpcompile {verb}" in capsys.readouterr().out


def test_as_a_process(tmp_path: Path) -> None:
    """What a shell sees: exit code 2, one line on stderr, nothing left behind."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch", "train", "--policy", "hfp9"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []
