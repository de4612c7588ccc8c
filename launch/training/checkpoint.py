"""Checkpoints: written aside and renamed, so that whatever `latest` names is whole; the newest sound one is loaded.

<run>/checkpoints/latest         the name of the newest one
<run>/checkpoints/step-000100/   run.json (step, loss scale, config, ranks), policy.yaml, rank-0.pt, ... (random states,
                                 and scales that the policy calls per rank)
                                 and of the engine: replica.pt (ddp) or engine/ (deepspeed, one shard per rank);
                                 checksums.json of all of them
"""

import os
import pickle
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.engines.engine import AbstractEngine
from launch.training.checksums import checksum, checksums, damages, write_checksums
from launch.training.config import ConfigError
from launch.training.record import RunRecord, candidates, read_record
from launch.training.world import World
from runtime.errors import LpError


def save_checkpoint(
    run: Path,
    record: RunRecord,
    policy_yaml: str,
    engine: AbstractEngine,
    world: World,
    own: dict[str, Tensor] | None = None,
) -> Path:
    """Write one checkpoint with all ranks and make it the latest. LpError on every rank if any cannot write. own: what
    of the model's state is this rank's alone.
    """
    final = run / "checkpoints" / f"step-{record.step:06d}"
    aside = final.with_name(final.name + ".tmp")
    try:
        with world.together(run):
            if world.is_first:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                (aside / "policy.yaml").write_text(policy_yaml)
        with world.together(run):
            torch.save(_random_states() | {"own": own or {}}, aside / f"rank-{world.rank}.pt")
            engine.save(aside)
        with world.together(run):
            shares = world.gathered(checksums(aside, world.rank, world.size))
            if world.is_first:
                sums = {name: each for share in shares for name, each in share.items()}
                listed = record.model_copy(update={"files": sorted(sums)})
                (aside / "run.json").write_text(listed.model_dump_json(indent=2))
                write_checksums(aside, sums | {"run.json": checksum(aside / "run.json")})
                _make_latest(aside, final)
    except LpError:
        if world.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def load_checkpoint(folder: Path, engine: AbstractEngine, world: World) -> tuple[RunRecord, dict[str, Tensor]]:
    """Put weights, optimizer and random states back; returns the record for whatever else goes on from there, and what
    of the model's state is this rank's alone.
    """
    record = read_record(folder)
    try:
        engine.load(folder)
        states = torch.load(folder / f"rank-{world.rank}.pt", weights_only=True)
        _set_random_states(states)
    except LpError:
        raise
    except Exception as error:  # whatever torch and an engine say of files that are not theirs
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # of which torch says how it would run
            named = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"{named[1] if named else 'a pickle'}, where only tensors and plain values are read"
        raise ConfigError("this checkpoint cannot be loaded", where=str(folder), got=reason[:300]) from error
    return record, states.get("own", {})


def find_sound_checkpoint(place: str | Path, world: World) -> tuple[Path, list[str]]:
    """The newest checkpoint that `place` means whose files are what was written, and what was found wrong with newer
    ones. Every rank looks at its share of the files. ConfigError if none is sound.
    """
    found = world.from_first_or_raise(lambda: candidates(place))
    notes: list[str] = []
    for folder in found:
        wrong = [each for share in world.gathered(_wrong_with(folder, world)) for each in share]
        if not wrong:
            return folder, notes
        notes.append(f"checkpoint {folder} is damaged: {wrong[0]}")
    hint = "an earlier checkpoint of the run" if len(found) == 1 else "starting afresh"
    raise ConfigError(notes[0], where=f"--resume {place}", hint=hint)


def _wrong_with(folder: Path, world: World) -> list[str]:
    try:
        record = read_record(folder)
    except ConfigError as error:
        return [str(error)]
    return damages(folder, record.files, world.rank, world.size)


def _make_latest(aside: Path, final: Path) -> None:
    if final.exists():  # a restarted run comes by again
        shutil.rmtree(final)
    aside.rename(final)
    pointer = final.with_name("latest.tmp")
    pointer.write_text(final.name + "\n")
    os.replace(pointer, final.with_name("latest"))


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
