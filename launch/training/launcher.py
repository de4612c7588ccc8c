"""Launcher: check what can be checked, start the workers, then those of the run to compare with, show the result.

The workers are torchrun's: its elastic agent runs in this process, starts N times `python -m launch train`, restarts
them if one is lost, and hands a worker's last words back.
"""

import json
import logging
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path

from launch.training.checkpoint import check_resumable, find_checkpoint, read_record
from launch.training.config import ConfigError, RunConfig
from launch.training.data import check_data
from launch.training.run_folder import prepare_folder, write_config
from launch.training.summary import present
from lpcompile import Policy, load_policy
from runtime.errors import LpError


class WorkerError(LpError):
    """A worker ended with an error of its own; `exit_code` is what the command should end with."""

    def __init__(self, what: str, exit_code: int, **parts: str) -> None:
        super().__init__(what, **parts)
        self.exit_code = exit_code


def launch(config: RunConfig) -> None:
    """One run on this machine, and the one it is compared with."""
    policy = check_run(config, config.nproc or 1)
    compared = load_policy(config.compare) if config.compare else None
    folder = prepare_folder(config, policy.name)
    _run_workers(config, folder)
    other = None
    if compared:
        other = folder / f"compare-{compared.name}"
        other.mkdir()
        _run_workers(config.model_copy(update={"policy": config.compare}), other)
    present(folder, other)


def check_run(config: RunConfig, world_size: int) -> Policy:
    """Everything about a run that is known to be wrong before a worker starts, as one error."""
    policy = load_policy(config.policy)
    if config.compare:
        load_policy(config.compare)
        if config.resume:
            raise ConfigError(
                "a resumed run cannot be compared: the other run would start from nothing", where="--compare"
            )
    check_data(config)
    if config.resume:
        found = find_checkpoint(config.resume)
        check_resumable(found, policy.name, policy.hash, world_size)
        if (step := read_record(found).step) >= config.steps:
            raise ConfigError(
                "this checkpoint is past the end of the run",
                where=str(found),
                expected=f"fewer than {config.steps} steps (--steps)",
                got=str(step),
            )
    return policy


def leave_last_words(error: LpError) -> None:
    """Hand a worker's error to the agent that started it, in the file torchrun has set aside for this."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": str(error), "extraInfo": extra}}))


def _run_workers(config: RunConfig, folder: Path) -> None:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    workers = config.nproc or 1
    absolute = {"out": str(folder), "nproc": workers, "compare": None, "overwrite": False}
    run_file = write_config(folder, config.model_copy(update=absolute))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its news is told below, in one sentence
    with tempfile.TemporaryDirectory(prefix="lpcompile-") as words:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=config.max_restarts,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=words),
        )
        command = ["-m", "launch", "train", "--config", str(run_file), "--prepared"]
        try:
            elastic_launch(settings, sys.executable)(*command)
        except ChildFailedError as error:
            raise _last_words(error, folder) from None


def _last_words(error: "Exception", folder: Path) -> WorkerError:
    rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
    if failure.exitcode == 2 and isinstance(failure.message, dict):
        return _Repeated(failure.message["message"])
    cause = f"signal {failure.signal_name()}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    hint = f"--resume {folder}" if (folder / "checkpoints" / "latest").is_file() else ""
    return WorkerError(f"worker {rank} was lost ({cause})", 1, where=str(folder), hint=hint)


class _Repeated(WorkerError):
    """A worker's own sentence, word by word."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence.rstrip("."), 2)
