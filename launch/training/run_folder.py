"""The run folder: always fresh, never an earlier run's unless asked. Its files, in the order they appear.

run.yaml          the config          certificate.txt/.json   what each GEMM was lowered to
metrics.jsonl     one line a step     tensorboard/            the same, for TensorBoard
checkpoints/      see checkpoint.py   summary.json, loss.png  the result
telemetry.json/.html, suggested.yaml    with --telemetry, see precision_log.py
"""

import shutil
from datetime import datetime
from pathlib import Path

from launch.training.config import ConfigError, RunConfig


def prepare_folder(config: RunConfig, policy_name: str) -> Path:
    """Make the folder of a run and its run.yaml; an earlier run in it is an error, or emptied with --overwrite."""
    folder = Path(config.out) if config.out else _fresh(policy_name, config.engine)
    if folder.is_symlink() and not folder.exists():
        raise ConfigError("this is a link to what is not there", where=f"--out {folder}", got=str(folder.readlink()))
    if folder.exists() and not folder.is_dir():
        raise ConfigError("this is a file and not a folder", where=f"--out {folder}")
    if folder.is_dir() and any(folder.iterdir()):
        _clear(folder, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config.model_copy(update={"out": str(folder)}))
    except OSError as error:
        reason = error.strerror or "it cannot be written"
        raise ConfigError("the folder of the run cannot be made", where=f"--out {folder}", got=reason) from None
    return folder


def write_config(folder: Path, config: RunConfig) -> Path:
    path = folder / "run.yaml"
    path.write_text(config.to_yaml())
    return path


def _clear(folder: Path, config: RunConfig) -> None:
    if not config.overwrite:
        raise ConfigError(
            "this folder is not empty", where=f"--out {folder}", hint="another folder, or --overwrite to empty it"
        )
    if not (folder / "run.yaml").is_file():
        raise ConfigError("this folder holds something else than a run and is not emptied", where=f"--out {folder}")
    if config.resume and Path(config.resume).resolve().is_relative_to(folder.resolve()):
        raise ConfigError("--overwrite would delete the checkpoint to resume from", where=f"--out {folder}")
    shutil.rmtree(folder)


def _fresh(policy_name: str, engine: str) -> Path:
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{policy_name}-{engine}"
    folder = Path("runs") / name
    count = 2
    while folder.exists():
        folder, count = Path("runs") / f"{name}-{count}", count + 1
    return folder
