"""Launcher: check what can be checked, start the workers, then those of the run to compare with, show the result.

The workers are torchrun's: its elastic agent runs in this process, starts N times `python -m launch train`, restarts
them if one is lost, and hands a worker's last words back.
"""

import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

from launch.training.config import ConfigError, RunConfig
from launch.training.dataset import check_dataset
from launch.training.last_words import WorkerError, first_cause, resume_hint, told
from launch.training.record import check_corpus, check_resumable, find_checkpoint, read_record
from launch.training.run_folder import prepare_folder, write_config
from launch.training.summary import present
from lpcompile import Policy, load_policy


def launch(config: RunConfig) -> None:
    """One run on this machine, and the one it is compared with."""
    policy = check_run(config, config.nproc or 1)
    compared = load_policy(config.compare) if config.compare else None
    folder = prepare_folder(config, policy.name)
    other = None
    try:
        _run_workers(config, folder)
        if compared:
            other = folder / f"compare-{compared.name}"
            other.mkdir()
            _run_workers(config.model_copy(update={"policy": config.compare}), other)
        present(folder, other)
    except OSError as error:  # of this process; what workers meet they say themselves
        raise told(error, folder) or error from error


def check_run(config: RunConfig, world_size: int) -> Policy:
    """Everything about a run that is known to be wrong before a worker starts, as one error."""
    policy = load_policy(config.policy)
    if config.compare:
        load_policy(config.compare)
        if config.resume:
            raise ConfigError(
                "a resumed run cannot be compared: the other run would start from nothing", where="--compare"
            )
    corpus_sha256 = check_dataset(config)
    if config.resume:
        found = find_checkpoint(config.resume)
        record = read_record(found)
        check_resumable(found, policy.name, policy.hash, world_size)
        if corpus_sha256:
            check_corpus(found, record, corpus_sha256, config.data or "the data of this model if --data is silent")
        if (step := record.step) >= config.steps:
            raise ConfigError(
                "this checkpoint is past the end of the run",
                where=str(found),
                expected=f"fewer than {config.steps} steps (--steps)",
                got=str(step),
            )
    return policy


def _run_workers(config: RunConfig, folder: Path) -> None:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    workers = config.nproc or 1
    absolute = {"out": str(folder), "nproc": workers, "compare": None, "overwrite": False}
    run_file = write_config(folder, config.model_copy(update=absolute))
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    if (
        threads != "1"
    ):  # OpenMP's threads spin for milliseconds at the end of every loop, and take the core from the one
        # that they wait for: beside one busy process a step took 45 times as long (benchmarks/beside_busy.py)
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
            raise first_cause(error.failures, folder) from None
        except SignalException as error:
            raise _stopped(error.sigval, folder) from None


def _stopped(number: int, folder: Path) -> WorkerError:
    """The exit code is that of a shell for a process that a signal ended."""
    name = signal.Signals(number).name
    hint = resume_hint(folder) or "a smaller --save-every: no checkpoint was written"
    return WorkerError(f"stopped by {name}", 128 + int(number), where=str(folder), hint=hint)
