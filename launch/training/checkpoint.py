"""Checkpoints: written aside and renamed, so that whatever `latest` names is whole.

<run>/checkpoints/latest         the name of the newest one
<run>/checkpoints/step-000100/   run.json (step, loss scale, config, ranks), policy.yaml, rank-0.pt, ... (random states)
                                 and of the engine: replica.pt (ddp) or engine/ (deepspeed, one shard per rank)
"""

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from launch.engines.engine import AbstractEngine
from launch.training.config import ConfigError
from launch.training.world import World

# Fields that say how a run is started and not what it is: a resumed run does not inherit them.
_NOT_INHERITED = ("out", "overwrite", "resume", "compare", "device", "max_restarts", "strict")


@dataclass(frozen=True)
class RunRecord:
    """What run.json holds: everything but tensors."""

    step: int  # optimizer steps done; the next one has this number
    world_size: int
    policy_name: str
    policy_hash: str
    loss_scale: dict[str, Any]
    config: dict[str, Any]
    torch_version: str

    def inherited_config(self) -> dict[str, Any]:
        """The layer under the flags of a resumed run."""
        return {key: value for key, value in self.config.items() if key not in _NOT_INHERITED} | {
            "nproc": self.world_size
        }


def save_checkpoint(run: Path, record: RunRecord, policy_yaml: str, engine: AbstractEngine, world: World) -> Path:
    """Write one checkpoint with all ranks and make it the latest."""
    final = run / "checkpoints" / f"step-{record.step:06d}"
    aside = final.with_name(final.name + ".tmp")
    if world.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        (aside / "run.json").write_text(json.dumps(asdict(record), indent=2))
        (aside / "policy.yaml").write_text(policy_yaml)
    dist.barrier()
    torch.save(_random_states(), aside / f"rank-{world.rank}.pt")
    engine.save(aside)
    dist.barrier()
    if world.is_first:
        if final.exists():  # a restarted run comes by again
            shutil.rmtree(final)
        aside.rename(final)
        pointer = final.with_name("latest.tmp")
        pointer.write_text(final.name + "\n")
        os.replace(pointer, final.with_name("latest"))
    dist.barrier()
    return final


def load_checkpoint(folder: Path, engine: AbstractEngine, world: World) -> RunRecord:
    """Put weights, optimizer and random states back; returns the record for whatever else goes on from there."""
    record = read_record(folder)
    engine.load(folder)
    _set_random_states(torch.load(folder / f"rank-{world.rank}.pt", weights_only=True))
    return record


def find_checkpoint(place: str | Path) -> Path:
    """The checkpoint meant by a run folder, its checkpoints folder, or one checkpoint."""
    path = Path(place)
    if not path.exists():
        raise ConfigError("there is no such folder", where=f"--resume {place}")
    if (path / "run.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if (latest := folder / "latest").is_file() and (folder / latest.read_text().strip() / "run.json").is_file():
            return folder / latest.read_text().strip()
    raise ConfigError(
        "this folder holds no checkpoint",
        where=f"--resume {place}",
        expected="a run folder with checkpoints/latest, or one checkpoint with run.json",
    )


def has_checkpoint(run: Path) -> bool:
    return (run / "checkpoints" / "latest").is_file()


def read_record(folder: Path) -> RunRecord:
    try:
        return RunRecord(**json.loads((folder / "run.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError("this checkpoint cannot be read", where=str(folder / "run.json"), got=str(error)) from None


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


def _random_states() -> dict[str, Any]:
    generator: Any = np.random.get_state()
    name, keys, *rest = generator
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
