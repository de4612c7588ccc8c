"""The command line: what a user gets wrong is one sentence on stderr and exit code 2, without a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import is_worker, run

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
TINY = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--batch", "2", "--steps", "2"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.cli._RANK_0_SPEAKS_S", 0.0)
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


def under_torchrun(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in {**TORCHRUN, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)


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
        (
            ["--model", "bert"],
            "--model: this value does not fit. Expected one of gpt, llama, resnet, mobilenet. Got 'bert'",
        ),
        (["--model", "mobilnet"], 'did you mean "mobilenet"'),
        (["--model", "resnet", "--data", "mnst"], '--data mnst: these images are not known. Did you mean "mnist"?'),
        (["--model", "resnet", "--data", "no-such-folder"], "Expected digits, mnist, a folder of CIFAR-10's batches"),
        (["--data", "mnist"], "Try --model resnet or mobilenet, which read images"),
        (["--engine", "none", "--nproc", "2"], "engine none is one process"),
        (["--engine", "fsdp"], "--engine: this value does not fit"),
        (["--zero-stage", "4"], "--zero-stage: this value does not fit"),
        (["--data", "no-such-file"], "--data no-such-file: the corpus cannot be read"),
        (["--tokenizer", "no-such-folder"], "--tokenizer no-such-folder: there is no such folder"),
        (["--vocab", "7"], "vocab: the vocabulary is too small"),
        (["--config", "no-such.yaml"], "no-such.yaml: this file cannot be read"),
        (["--resume", "nowhere"], "--resume nowhere: there is no such folder"),
        (["--resume", "."], "--resume .: this folder holds no checkpoint"),
        (["--no-such-flag"], "No such option: --no-such-flag"),
        (["--nproc", "0"], "--nproc: this value does not fit"),
        (["--nproc", "1000000"], "--nproc: this value does not fit"),
        (["--timeout", "inf"], "--timeout: this value does not fit. Expected a finite number"),
        (["--timeout", "1e300"], "--timeout: this value does not fit"),
        (["--timeout", "1e-9"], "--timeout: this value does not fit"),
        (["--timeout", "nan"], "--timeout: this value does not fit"),
        (["--seed", str(2**64)], "--seed: this value does not fit"),
        (["--seed", "9" * 5000], "--seed: this value does not fit"),
        (["--lr", "1e999"], "--lr: this value does not fit. Expected a finite number"),
        (["--lr", "inf"], "--lr: this value does not fit. Expected a finite number"),
        (["--clip", "inf"], "--clip: this value does not fit"),
        (["--steps", "1.5e0"], "--steps: this value does not fit"),
        (["--tokenizer", "gpt2"], "names are not looked up"),
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
    under_torchrun(monkeypatch, rank=0)
    assert "has set the number of workers. Expected 4" in refuse(capsys, "train", "--policy", "fp32", "--nproc", "2")


def test_under_torchrun_another_rank_speaks_if_rank_0_did_not_fail_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    under_torchrun(monkeypatch, rank=1)
    assert refuse(capsys, "train", "--policy", "hfp9").startswith('rank 1: "hfp9" is neither')
    assert len(waited) == 1, "time for torchrun to end it where rank 0 failed as well"
    under_torchrun(monkeypatch, rank=0)
    assert refuse(capsys, "train", "--policy", "hfp9").startswith('"hfp9" is neither')
    assert len(waited) == 1


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"])
@pytest.mark.parametrize("arguments", [["train", "--policy", "nope"], ["policy", "show", "nope"], ["bench", "nope"]])
def test_one_variable_of_torchrun_changes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]
) -> None:
    monkeypatch.setenv(name, "1")
    assert "nope" in refuse(capsys, *arguments)
    assert not is_worker()


@pytest.mark.parametrize(("theirs", "ours"), [("--learning-rate", "--lr"), ("--seq-len", "--context")])
def test_what_others_call_a_flag_is_known(capsys: pytest.CaptureFixture[str], theirs: str, ours: str) -> None:
    assert f"It is {ours} here" in refuse(capsys, "train", theirs, "1")


def test_no_sentence_ends_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert "?." not in refuse(capsys, "opt", "gtp", "--policy", "hfp8")


def test_a_link_to_nothing_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    assert "this is a link to what is not there" in refuse(capsys, "train", "--out", "run")


@pytest.mark.parametrize("verb", ["quantize", "search", "export"])
def test_planned_verbs_are_refused_by_name(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert f'"{verb}"' in refuse(capsys, verb, "--any", "thing")


def test_an_unknown_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "trian" in refuse(capsys, "trian")


def test_bench_refuses_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "bench" in refuse(capsys, "bench", "no-such-benchmark")


@pytest.mark.parametrize("verb", ["train", "bench", "reproduce"])
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
