"""Agreement: before the first step, every rank says what it is about to run, and the first field that differs is told.

Ranks that differ in a seed, a corpus or a policy would train on, each something else, and end with exit code 0.
"""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from launch.training.config import ConfigError, RunConfig, flag_of
from launch.training.world import World

# Where a run lies and how it is started may differ between machines; what data and policies hold is compared instead.
_MAY_DIFFER = ("data", "tokenizer", "policy", "out", "overwrite", "resume", "compare", "nproc")


def check_agreement(config: RunConfig, policy_hash: str, corpus_sha256: str, num_parameters: int, world: World) -> None:
    """Raise ConfigError on every rank, naming the field and the rank, where a rank differs from rank 0."""
    fields = {flag_of(key): value for key, value in config.model_dump().items() if key not in _MAY_DIFFER}
    fields |= {"--policy": policy_hash[:16], "--data": f"sha256 {corpus_sha256[:16]}", "parameters": num_parameters}
    fields |= _versions()
    compare(world.gathered(fields))


def compare(of_ranks: list[dict[str, Any]]) -> None:
    """The same, of what all ranks said."""
    first = of_ranks[0]
    for rank, fields in enumerate(of_ranks):
        for name, value in fields.items():
            if value != first.get(name):
                error = ConfigError(
                    "the ranks do not run the same",
                    where=f"rank {rank}: {name}",
                    expected=f"{first.get(name)}, as on rank 0",
                    got=str(value),
                )
                error.is_of_all_ranks = True
                raise error


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("lpcompile", "transformers", "deepspeed", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return {f"version of {name}": each for name, each in found.items()}
