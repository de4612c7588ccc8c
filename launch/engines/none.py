"""No engine: one process that holds the whole model; nothing travels."""

import torch
from torch import nn

from launch.engines.replica import ReplicaEngine
from launch.training.config import ConfigError, RunConfig
from launch.training.world import World
from runtime.collectives.codec import WireSpec


class NoEngine(ReplicaEngine):
    """The model itself. A policy's `wire` has nothing to compress here."""

    def __init__(self, model: nn.Module, config: RunConfig, wire: WireSpec | None, world: World) -> None:
        if world.size > 1:
            raise ConfigError(
                "this engine is one process", where="--engine none", expected="1 worker", got=str(world.size),
                hint="--engine ddp or deepspeed",
            )  # fmt: skip
        super().__init__(model, config, wire, world)

    @property
    def name(self) -> str:
        return "no engine"

    def uncompressed_bytes(self, dtype: torch.dtype) -> int:
        return 0
