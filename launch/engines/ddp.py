"""DDP: every rank holds the whole model; gradients are averaged bucket by bucket during backward."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launch.engines.engine import AbstractEngine, clip_norm
from launch.training.config import RunConfig
from launch.training.optimizer import MasterWeights, build_optimizer, is_torch_adamw
from launch.training.world import World
from lpcompile.optimizers import update_formats
from runtime.collectives import ledger
from runtime.collectives.attach.ddp import attach_ddp
from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import WireCounter


class DdpEngine(AbstractEngine):
    """DistributedDataParallel; torch's AdamW has fp32 masters of bf16 parameters, other optimizers keep their own."""

    def __init__(self, model: nn.Module, config: RunConfig, wire: WireSpec | None, world: World) -> None:
        self._config, self._world = config, world
        self._model = model.to(world.device)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._ddp = DistributedDataParallel(self._model, gradient_as_bucket_view=True)
        self._counter = WireCounter()
        attach_ddp(self._ddp, wire, self._counter)
        update = update_formats(model)
        needs_masters = config.dtype == "bf16" and is_torch_adamw(config, update)
        self._masters = MasterWeights(self._parameters) if needs_masters else None
        self._updated = self._masters.masters if self._masters else self._parameters
        self._optimizer = build_optimizer(config, self._updated, update)

    @property
    def name(self) -> str:
        return "ddp"

    @property
    def counter(self) -> WireCounter:
        return self._counter

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        model = self._ddp if self._model.training else self._model
        logits: Tensor = model(**inputs).logits
        return logits

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._ddp.no_sync()

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
        self._ddp.zero_grad()
        return norm

    def uncompressed_bytes(self, dtype: torch.dtype) -> int:
        shapes = [parameter.shape for parameter in self._parameters]
        return ledger.predict_all_reduce(shapes, dtype, None, self._world.size).total

    def save(self, folder: Path) -> None:
        if not self._world.is_first:
            return
        torch.save(
            {
                "model": self._model.state_dict(),
                "masters": self._masters.state_dict() if self._masters else None,
                "optimizer": self._optimizer.state_dict(),
            },
            folder / "replica.pt",
        )

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "replica.pt", map_location=self._world.device, weights_only=True)
        self._model.load_state_dict(state["model"])
        if self._masters:
            self._masters.load_state_dict(state["masters"])
        self._optimizer.load_state_dict(state["optimizer"])
