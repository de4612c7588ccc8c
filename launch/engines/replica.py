"""Replica: an engine whose every rank holds the whole model, with its optimizer; what travels, a subclass says."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from launch.engines.engine import AbstractEngine, clip_norm
from launch.training.config import RunConfig
from launch.training.optimizer import MasterWeights, build_optimizer, is_torch_adamw
from launch.training.world import World
from lpcompile.optimizers import update_formats
from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import WireCounter


class ReplicaEngine(AbstractEngine):
    """torch's AdamW has fp32 masters of bf16 parameters, other optimizers keep their own."""

    def __init__(self, model: nn.Module, config: RunConfig, wire: WireSpec | None, world: World) -> None:
        self._config, self._world, self._counter = config, world, WireCounter()
        self._model = model.to(world.device)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        update = update_formats(model)
        needs_masters = config.dtype == "bf16" and is_torch_adamw(config, update)
        self._masters = MasterWeights(self._parameters) if needs_masters else None
        self._updated = self._masters.masters if self._masters else self._parameters
        self._optimizer = build_optimizer(config, self._updated, update)

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

    def save(self, folder: Path) -> None:
        if self._world.is_first:
            masters = self._masters.state_dict() if self._masters else None
            state = {"model": self._model.state_dict(), "masters": masters, "optimizer": self._optimizer.state_dict()}
            torch.save(state, folder / "replica.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "replica.pt", map_location=self._world.device, weights_only=True)
        self._model.load_state_dict(state["model"])
        if self._masters:
            self._masters.load_state_dict(state["masters"])
        self._optimizer.load_state_dict(state["optimizer"])
