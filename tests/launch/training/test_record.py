"""Records: which checkpoint a place means, and what is said of a run.json that is not one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.training.config import ConfigError, RunConfig
from launch.training.record import (
    LossScaleRecord,
    RunRecord,
    candidates,
    check_corpus,
    check_resumable,
    find_checkpoint,
    read_record,
)

SCALE = LossScaleRecord(kind="dynamic", value=65536.0, clean_steps=0, skipped=0)


def record(step: int = 4) -> RunRecord:
    return RunRecord(
        step=step,
        world_size=2,
        policy_name="hfp8",
        policy_hash="a" * 64,
        corpus_sha256="c" * 64,
        files=[],
        loss_scale=SCALE,
        config=RunConfig(out="runs/x", overwrite=True, compare="fp32").model_dump(),
        torch_version="2",
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (4, 8):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(record(step).model_dump_json())
    (tmp_path / "checkpoints" / "latest").write_text("step-000008\n")
    return tmp_path


def test_a_run_its_checkpoints_and_one_checkpoint_are_found(run: Path) -> None:
    latest = run / "checkpoints" / "step-000008"
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == find_checkpoint(latest) == latest
    assert find_checkpoint(run / "checkpoints" / "step-000004").name == "step-000004"


def test_a_checkpoint_half_written_is_none(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step-000004\n")
    (run / "checkpoints" / "step-000012.tmp").mkdir()
    assert find_checkpoint(run).name == "step-000004", "the newer one was not finished"
    (run / "checkpoints" / "latest").unlink()
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find_checkpoint(run)


def test_a_checkpoint_that_latest_names_and_is_gone_is_no_reason_to_stop(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-000008")
    assert [each.name for each in candidates(run)] == ["step-000008", "step-000004"], "what is told, what is used"
    assert find_checkpoint(run).name == "step-000004"


@pytest.mark.parametrize("latest", ["", "\0", "step-9", "../../other/checkpoints/step-000004", "/etc/passwd", b"\xff"])
def test_latest_is_a_name_and_no_path(run: Path, tmp_path: Path, latest: str | bytes) -> None:
    if latest == "/etc/passwd":  # a path that holds another run's checkpoint
        latest = str(run / "checkpoints" / "step-000004")
    (run / "checkpoints" / "latest").write_bytes(latest if isinstance(latest, bytes) else latest.encode())
    assert find_checkpoint(run) == run / "checkpoints" / "step-000008", "the newest that is there"


def test_a_resumed_run_does_not_inherit_where_and_how_it_was_started(run: Path) -> None:
    inherited = read_record(find_checkpoint(run)).inherited_config()
    assert not {"out", "overwrite", "compare", "resume"} & set(inherited)
    assert inherited["nproc"] == 2


BAD: dict[str, Any] = {
    "null hash": {"policy_hash": None},
    "short hash": {"policy_hash": "a"},
    "step as text": {"step": "8"},
    "step of another checkpoint": {"step": 3},
    "step true": {"step": True},
    "negative step": {"step": -8},
    "a million ranks": {"world_size": 10**6},
    "no ranks": {"world_size": 0},
    "NaN": {"loss_scale": {**SCALE.model_dump(), "value": float("nan")}},
    "infinity": {"loss_scale": {**SCALE.model_dump(), "value": float("inf")}},
    "zero scale": {"loss_scale": {**SCALE.model_dump(), "value": 0.0}},
    "empty scale": {"loss_scale": {}},
    "config that is a list": {"config": []},
    "a field too many": {"extra": 1},
    "corpus of another type": {"corpus_sha256": 7},
    "files that are no names": {"files": [7]},
    "no list of files": {"files": None},
}


@pytest.mark.parametrize("name", BAD)
def test_a_record_of_other_types_is_a_sentence(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-000008" / "run.json"
    path.write_text(json.dumps({**record(8).model_dump(), **BAD[name]}))
    with pytest.raises(ConfigError, match="this checkpoint cannot be read"):
        read_record(path.parent)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "1", "[" * 100_000, "9" * 5000, '{"step": NaN}', "\0", "é"])
def test_a_record_that_is_no_record_is_a_sentence(run: Path, text: str) -> None:
    path = run / "checkpoints" / "step-000008" / "run.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="this checkpoint cannot be read"):
        read_record(path.parent)
    assert find_checkpoint(run).name == "step-000004", "the previous one is meant"


@pytest.mark.parametrize(
    ("policy_hash", "ranks", "sentence"),
    [("b" * 64, 2, "under another policy. Expected hfp8"), ("a" * 64, 4, "another number of ranks")],
)
def test_another_policy_or_world_is_refused(run: Path, policy_hash: str, ranks: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_resumable(find_checkpoint(run), "other", policy_hash, ranks)


def test_other_tokens_are_refused_wherever_they_lie(run: Path) -> None:
    found = find_checkpoint(run)
    check_corpus(found, read_record(found), "c" * 64, "elsewhere.txt")
    with pytest.raises(ConfigError, match=r"on another corpus. Expected tokens with the sha256 cccc.* of text.txt"):
        check_corpus(found, read_record(found), "d" * 64, "text.txt")
