"""Records: which checkpoint a place means, and what its run.json says, checked before anything is done with it.

<run>/checkpoints/latest         the name of the newest one
<run>/checkpoints/step-000100/   run.json, checksums.json, policy.yaml, and what checkpoint.py and the engine write
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launch.training.config import MOST_WORKERS, ConfigError

# Fields that say how a run is started and not what it is: a resumed run does not inherit them.
_NOT_INHERITED = ("out", "overwrite", "resume", "compare", "device", "max_restarts", "strict")


class LossScaleRecord(BaseModel):
    """What runtime/optim/loss_scale.py keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["none", "static", "dynamic"]
    value: float = Field(gt=0, allow_inf_nan=False)
    clean_steps: int = Field(ge=0)
    skipped: int = Field(ge=0)


class RunRecord(BaseModel):
    """What run.json holds: everything but tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    step: int = Field(ge=1)  # optimizer steps done; the next one has this number
    world_size: int = Field(ge=1, le=MOST_WORKERS)
    policy_name: str
    policy_hash: str = Field(pattern="^[0-9a-f]{64}$")
    corpus_sha256: str = Field(pattern="^[0-9a-f]{64}$")  # of the tokens that the run reads, in their order
    files: list[str]  # of the checkpoint, but run.json and the checksums; filled in as it is written
    loss_scale: LossScaleRecord
    config: dict[str, Any]
    torch_version: str

    def inherited_config(self) -> dict[str, Any]:
        """The layer under the flags of a resumed run."""
        return {key: value for key, value in self.config.items() if key not in _NOT_INHERITED} | {
            "nproc": self.world_size
        }


def find_checkpoint(place: str | Path) -> Path:
    """The checkpoint meant by a run folder, its checkpoints folder, or one checkpoint: the newest whose record reads.

    Raises ConfigError, of the newest, if none does.
    """
    errors = []
    for folder in candidates(place):
        try:
            read_record(folder)
        except ConfigError as error:
            errors.append(error)
        else:
            return folder
    raise errors[0]


def candidates(place: str | Path) -> list[Path]:
    """The checkpoint that `place` means, and those before it in the same run, newest first. Raises ConfigError.

    One that is named itself is the only one. A run's `latest` is a name and nothing else: no path is followed.
    """
    path = Path(place)
    if not path.exists():
        raise ConfigError("there is no such folder", where=f"--resume {place}")
    if (path / "run.json").is_file():
        return [path]
    for folder in (path, path / "checkpoints"):
        if not (folder / "latest").exists():
            continue
        latest = _latest(folder)  # one that is gone is told where its record is read
        names = {each.name for each in folder.glob("step-*") if _NAME.fullmatch(each.name)} | ({latest} - {""})
        found = sorted(names, key=lambda name: int(name[5:]), reverse=True)
        if found:  # what is newer than the latest was not finished
            return [folder / name for name in found if not latest or int(name[5:]) <= int(latest[5:])]
    raise ConfigError(
        "this folder holds no checkpoint",
        where=f"--resume {place}",
        expected="a run folder with checkpoints/latest, or one checkpoint with run.json",
    )


def has_checkpoint(run: Path) -> bool:
    return (run / "checkpoints" / "latest").is_file()


def read_record(folder: Path) -> RunRecord:
    """The record of a checkpoint. Raises ConfigError with what is wrong: not JSON, a type, a bound, another step."""
    path = folder / "run.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        record = RunRecord.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        got = f"{first['input']!r}"[:80]
        raise ConfigError(
            "this checkpoint cannot be read", where=f"{path}: {field}", expected=first["msg"], got=got
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        got = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise ConfigError("this checkpoint cannot be read", where=str(path), got=got) from None
    if _NAME.fullmatch(folder.name) and int(folder.name[5:]) != record.step:
        raise ConfigError(
            "this checkpoint cannot be read", where=f"{path}: step", expected=str(int(folder.name[5:])),
            got=str(record.step),
        )  # fmt: skip
    return record


def check_resumable(folder: Path, policy_name: str, policy_hash: str, world_size: int) -> None:
    """A checkpoint goes on as what it was: same policy, same number of ranks (the model is checked with the config)."""
    record = read_record(folder)
    if record.policy_hash != policy_hash:
        raise ConfigError(
            "this checkpoint was trained under another policy",
            where=str(folder),
            expected=f"{record.policy_name} ({record.policy_hash[:12]})",
            got=f"{policy_name} ({policy_hash[:12]})",
            hint=f"--policy {folder / 'policy.yaml'}",
        )
    if record.world_size != world_size:
        raise ConfigError(
            "this checkpoint was written by another number of ranks, among which its data and shards are divided",
            where=str(folder),
            expected=str(record.world_size),
            got=str(world_size),
        )


def check_corpus(folder: Path, record: RunRecord, corpus_sha256: str, corpus_name: str) -> None:
    """A run goes on with the tokens it began with, wherever they lie now."""
    if record.corpus_sha256 != corpus_sha256:
        raise ConfigError(
            "this checkpoint was trained on another corpus",
            where=str(folder),
            expected=f"tokens with the sha256 {record.corpus_sha256[:16]}",
            got=f"{corpus_sha256[:16]}, of {corpus_name}",
            hint="--data with the text of then",
        )


def _latest(folder: Path) -> str:
    try:
        name = (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return name if _NAME.fullmatch(name) else ""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is not JSON")


_NAME = re.compile(r"step-[0-9]{6,12}")
