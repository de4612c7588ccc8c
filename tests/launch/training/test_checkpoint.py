"""Checkpoints: every file has a checksum, damage is told, files of others are a sentence and never run."""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.training.checkpoint import find_sound_checkpoint, load_checkpoint, save_checkpoint
from launch.training.checksums import NAME
from launch.training.config import ConfigError
from launch.training.record import read_record
from launch.training.watch import Watch
from launch.training.world import World
from runtime.errors import LpError
from tests.launch.training.test_record import record
from tests.multiprocess import run_ranks


class Engine:
    """Writes two files a rank, or fails as a full disk does."""

    def __init__(self, rank: int, full: bool = False) -> None:
        self.rank, self.full, self.loaded = rank, full, None

    def save(self, folder: Path) -> None:
        path = Path("/dev/full") if self.full else folder / f"weights-{self.rank}.pt"
        torch.save({"w": torch.arange(1000.0)}, path)
        (folder / "engine").mkdir(exist_ok=True)  # where DeepSpeed's shards are
        torch.save({"m": torch.arange(1000.0)}, folder / "engine" / f"shard-{self.rank}.pt")

    def load(self, folder: Path) -> None:
        self.loaded = torch.load(folder / f"weights-{self.rank}.pt", weights_only=True)


def _world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"), 0, Watch())


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The world of one rank, in this process."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield _world(0, 1)
    dist.destroy_process_group()


def _save_two(folder: Path, world: World) -> Path:
    for step in (4, 8):
        save_checkpoint(folder, record(step), "name: x\n", Engine(world.rank), world)  # type: ignore[arg-type]
    return folder / "checkpoints" / "step-000008"


def _damage(path: Path, change: str) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes({"flip": raw, "cut": raw[: len(raw) // 2]}.get(change, b""))
    if change == "gone":
        path.unlink()


@pytest.mark.parametrize("name", ["weights-0.pt", "engine/shard-0.pt", "rank-0.pt", "run.json", "policy.yaml", NAME])
@pytest.mark.parametrize("change", ["flip", "cut", "empty", "gone"])
def test_a_damaged_file_means_the_previous_checkpoint(tmp_path: Path, alone: World, name: str, change: str) -> None:
    saved, engine = _save_two(tmp_path, alone), Engine(0)
    assert find_sound_checkpoint(tmp_path, alone) == (saved, [])
    _damage(saved / name, change)
    found, notes = find_sound_checkpoint(tmp_path, alone)
    assert found.name == "step-000004"
    assert len(notes) == 1
    assert "step-000008 is damaged: " in notes[0]
    load_checkpoint(found, engine, alone)  # type: ignore[arg-type]
    assert engine.loaded is not None
    if (saved / "run.json").is_file():
        with pytest.raises(ConfigError, match=r"step-000008 is damaged: .* Try an earlier checkpoint of the run"):
            find_sound_checkpoint(saved, alone)


@pytest.mark.parametrize("name", ["weights-0.pt", "rank-0.pt", "run.json", "policy.yaml", "all"])
def test_a_file_without_a_checksum_means_the_previous_checkpoint(tmp_path: Path, alone: World, name: str) -> None:
    saved = _save_two(tmp_path, alone)
    (saved / "note.txt").write_text("kept for the paper")
    assert find_sound_checkpoint(tmp_path, alone) == (saved, [])
    sums = json.loads((saved / NAME).read_text())
    (saved / NAME).write_text(json.dumps({key: each for key, each in sums.items() if name not in (key, "all")}))
    _damage(saved / "weights-0.pt", "flip")
    found, notes = find_sound_checkpoint(tmp_path, alone)
    assert found.name == "step-000004"
    assert name == "all" or notes == [f"checkpoint {saved} is damaged: {name} has no checksum"]
    with pytest.raises(ConfigError, match="has no checksum"):
        find_sound_checkpoint(saved, alone)


@pytest.mark.parametrize("name", ["weights-0.pt", "engine/shard-0.pt", "rank-0.pt", "policy.yaml"])
def test_a_file_that_is_gone_with_its_checksum_means_the_previous_checkpoint(
    tmp_path: Path, alone: World, name: str
) -> None:
    saved = _save_two(tmp_path, alone)
    sums = json.loads((saved / NAME).read_text())
    (saved / NAME).write_text(json.dumps({key: each for key, each in sums.items() if key != name}))
    (saved / name).unlink()
    found, notes = find_sound_checkpoint(tmp_path, alone)
    assert (found.name, notes) == ("step-000004", [f"checkpoint {saved} is damaged: {name} is missing"])
    with pytest.raises(ConfigError, match=f"damaged: {name} is missing. Try an earlier checkpoint of the run"):
        find_sound_checkpoint(saved, alone)


def test_a_checkpoint_that_is_gone_as_a_whole_is_told(tmp_path: Path, alone: World) -> None:
    saved = _save_two(tmp_path, alone)
    shutil.rmtree(saved)
    found, notes = find_sound_checkpoint(tmp_path, alone)
    assert found.name == "step-000004"
    assert notes[0].startswith(f"checkpoint {saved} is damaged: ")


def test_what_is_whole_has_a_sum_of_every_file(tmp_path: Path, alone: World) -> None:
    saved = _save_two(tmp_path, alone)
    sums = json.loads((saved / NAME).read_text())
    written = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert set(sums) == written - {NAME}
    assert set(read_record(saved).files) == set(sums) - {"run.json"}
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def _save_on_two_ranks(rank: int, size: int, folder: str) -> list[str]:
    """What each rank sees: a damaged shard of rank 1, then a disk that is full for rank 1."""
    world, root = _world(rank, size), Path(folder)
    saved = _save_two(root, world)
    if world.is_first:
        _damage(saved / "weights-1.pt", "flip")
    dist.barrier()
    found, notes = find_sound_checkpoint(root, world)
    try:
        save_checkpoint(root / "full", record(4), "", Engine(rank, full=rank == 1), world)  # type: ignore[arg-type]
    except LpError as error:
        return [found.name, *notes, str(error)]
    return []


def test_ranks_agree_on_damage_and_on_a_full_disk(tmp_path: Path) -> None:
    told = run_ranks(_save_on_two_ranks, 2, str(tmp_path))
    assert told[0] == told[1]
    found, note, full = told[0]
    assert found == "step-000004"
    assert "weights-1.pt has another checksum than was written" in note
    assert full.startswith("rank 1: ")
    assert "a file cannot be written. Got " in full
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == [], "what was half written is gone"


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["hostile", "empty", "text", "pickle", "cut"])
def test_files_of_others_are_a_sentence_and_do_not_run(tmp_path: Path, alone: World, content: str) -> None:
    saved = _save_two(tmp_path, alone)
    path = saved / "weights-0.pt"
    contents = {"empty": b"", "text": b"hello", "pickle": pickle.dumps({"a": 1}), "cut": path.read_bytes()[:500]}
    if content == "hostile":
        torch.save({"w": _Hostile(tmp_path / "ran")}, path)
    else:
        path.write_bytes(contents[content])
    with pytest.raises(ConfigError, match="this checkpoint cannot be loaded") as caught:
        load_checkpoint(saved, Engine(0), alone)  # type: ignore[arg-type]
    assert "weights_only" not in str(caught.value), "torch's advice would run it"
    assert content != "hostile" or "Got posix.mkdir, where only tensors and plain values" in str(caught.value)
    assert not (tmp_path / "ran").exists()
