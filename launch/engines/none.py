"""No engine: one process that holds the whole model; nothing travels."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from launch.engines.engine import AbstractEngine, clip_norm
from launch.training.config import ConfigError, RunConfig
from launch.training.optimizer import MasterWeights, build_optimizer, is_torch_adamw
from launch.training.world import World
from lpcompile.optimizers import update_formats
from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import WireCounter


class NoEngine(AbstractEngine):
    """The model itself. A policy's `wire` has nothing to compress here."""

    def __init__(self, model: nn.Module, config: RunConfig, wire: WireSpec | None, world: World) -> None:
        if world.size > 1:
            raise ConfigError(
                "this engine is one process", where="--engine none", expected="1 worker", got=str(world.size),
                hint="--engine ddp or deepspeed",
            )  # fmt: skip
        self._config, self._world, self._counter = config, world, WireCounter()
        self._model = model.to(world.device)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        update = update_formats(model)
        needs_masters = config.dtype == "bf16" and is_torch_adamw(config, update)
        self._masters = MasterWeights(parameters) if needs_masters else None
        self._updated = self._masters.masters if self._masters else parameters
        self._optimizer = build_optimizer(config, self._updated, update)

    @property
    def name(self) -> str:
        return "no engine"

    @property
    def counter(self) -> WireCounter:
        return self._counter

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self._model(**inputs).logits
        return logits

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss / self._config.grad_accumulation).backward()

    def step(self, lr: float, skip: bool) -> float | None:
        if self._masters:
            self._masters.take_gradients()
        norm = clip_norm(self._updated, self._config.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.skip = skip
        self._optimizer.step()
        if self._masters and not skip:
            self._masters.give_weights()
        self._model.zero_grad()
        return norm

    def uncompressed_bytes(self, dtype: torch.dtype) -> int:
        return 0

    def save(self, folder: Path) -> None:
        masters = self._masters.state_dict() if self._masters else None
        state = {"model": self._model.state_dict(), "masters": masters, "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / "replica.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "replica.pt", map_location=self._world.device, weights_only=True)
        self._model.load_state_dict(state["model"])
        if self._masters:
            self._masters.load_state_dict(state["masters"])
        self._optimizer.load_state_dict(state["optimizer"])
