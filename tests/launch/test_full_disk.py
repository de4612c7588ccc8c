"""A real full disk, a small tmpfs: one sentence wherever it strikes, what was half written is gone, the rest stays."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.kills import start, write_text


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that a test mounts a disk on; it needs to be root."""
    write_text(tmp_path)
    (tmp_path / "disk").mkdir()
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], capture_output=True, check=False)


def _mount(disk: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")


SIZES = [  # what no longer fits, of a run whose checkpoints take 330 kB on ddp
    pytest.param("size=4k", "ddp", [], id="certificate"),
    pytest.param("size=20k", "ddp", [], id="tensorboard"),
    pytest.param("size=28k", "ddp", [], id="policy"),
    pytest.param("size=200k", "ddp", [], id="weights"),
    pytest.param("size=500k", "ddp", ["latest", "step-000002"], id="second"),
    pytest.param("size=1m,nr_inodes=20", "ddp", ["latest", "step-000002"], id="inodes"),
    pytest.param("size=200k", "deepspeed", [], id="shards"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "engine", "left"), SIZES)
def test_a_full_disk_is_one_sentence(disk: Path, options: str, engine: str, left: list[str]) -> None:
    _mount(disk, options)
    arguments = ["--nproc", "2", "--steps", "6", "--save-every", "2", "--timeout", "120", "--engine", engine]
    parent = start(disk.parent, *arguments, "--out", "disk/run")
    assert parent.wait(timeout=100) == 1, "long before others wait in vain"
    told = (disk.parent / "log").read_text()
    assert "Traceback" not in told
    assert "disk/run: the disk is full. Got No space left on device. Try making room" in told.splitlines()[-1]
    checkpoints = disk / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("*")) == left
