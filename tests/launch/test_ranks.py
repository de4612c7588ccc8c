"""Ranks that are started each for itself and differ: the field and the rank are told, and nobody trains."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.kills import ENVIRONMENT, TINY, write_text
from tests.multiprocess import free_port

WIRE = "version: 1\nname: hfp8-wire\nextends: [hfp8]\nwire: {format: e5m2, block: 128}\n"
DIFFERENT = {
    "seed": ["--seed", "3"],
    "data": ["--data", "other.txt"],
    "lr": ["--lr", "0.5"],
    "clip": ["--clip", "0.1"],
    "accumulation": ["--grad-accumulation", "2"],
    "policy": ["--policy", "bf16"],
    "wire": ["--policy", "wire.yaml"],
    "steps": ["--steps", "9"],
    "width": ["--width", "64"],
    "layers": ["--layers", "2"],
    "engine": ["--engine", "deepspeed"],
}


@pytest.fixture(autouse=True)
def _texts(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "other.txt").write_text((tmp_path / "text.txt").read_text()[::-1])
    (tmp_path / "wire.yaml").write_text(WIRE)


def _two_ranks(folder: Path, of_rank_1: list[str], timeout: str = "60") -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    port = free_port()
    common = [*TINY, "--steps", "2", "--timeout", timeout, "--out", "run"]
    of_all = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "launch", "train", *common, *(of_rank_1 if rank else [])],
            cwd=folder,
            env={**ENVIRONMENT, **of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate()[1] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, told)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "seed" else pytest.mark.slow) for name in DIFFERENT]
)
def test_ranks_that_differ_do_not_train(tmp_path: Path, name: str) -> None:
    (code_0, told), (code_1, silent) = _two_ranks(tmp_path, DIFFERENT[name])
    assert (code_0, code_1) == (2, 2)
    assert told.splitlines()[-1].startswith(f"rank 1: {DIFFERENT[name][0]}: the ranks do not run the same. Expected ")
    assert "Traceback" not in told + silent
    assert "the ranks do not run the same" not in silent, "it is told once"


def test_an_error_of_another_rank_is_told_by_it_and_the_first_does_not_wait_without_a_word(tmp_path: Path) -> None:
    (code_0, waited), (code_1, told) = _two_ranks(tmp_path, ["--data", "nowhere.txt"], timeout="10")
    assert (code_0, code_1) == (2, 2)
    assert told.splitlines()[-1].startswith("rank 1: --data nowhere.txt: the corpus cannot be read. Got No such file")
    assert "the ranks did not all join. Expected 2 ranks within 10 s." in waited.splitlines()[-1]
    assert "Traceback" not in told + waited
