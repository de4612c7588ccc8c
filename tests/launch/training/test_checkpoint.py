"""Checkpoints: what counts as one, and what is said when it is none."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from launch.training.checkpoint import RunRecord, check_resumable, find_checkpoint, read_record
from launch.training.config import ConfigError, RunConfig

RECORD = RunRecord(
    step=4,
    world_size=2,
    policy_name="hfp8",
    policy_hash="a" * 64,
    loss_scale={},
    config=RunConfig(out="runs/x", overwrite=True, compare="fp32").model_dump(),
    torch_version="2",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (4, 8):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(asdict(RECORD)))
    (tmp_path / "checkpoints" / "latest").write_text("step-000008\n")
    return tmp_path


def test_a_run_its_checkpoints_and_one_checkpoint_are_found(run: Path) -> None:
    latest = run / "checkpoints" / "step-000008"
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == find_checkpoint(latest) == latest
    assert find_checkpoint(run / "checkpoints" / "step-000004").name == "step-000004"


def test_a_checkpoint_half_written_is_none(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step-000012\n")
    (run / "checkpoints" / "step-000012.tmp").mkdir()
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find_checkpoint(run)


def test_a_resumed_run_does_not_inherit_where_and_how_it_was_started(run: Path) -> None:
    inherited = read_record(find_checkpoint(run)).inherited_config()
    assert not {"out", "overwrite", "compare", "resume"} & set(inherited)
    assert inherited["nproc"] == 2


def test_a_record_that_is_not_json_is_a_sentence(run: Path) -> None:
    latest = find_checkpoint(run)
    (latest / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="this checkpoint cannot be read"):
        read_record(latest)


@pytest.mark.parametrize(
    ("policy_hash", "ranks", "sentence"),
    [("b" * 64, 2, "under another policy. Expected hfp8"), ("a" * 64, 4, "another number of ranks")],
)
def test_another_policy_or_world_is_refused(run: Path, policy_hash: str, ranks: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_resumable(find_checkpoint(run), "other", policy_hash, ranks)
