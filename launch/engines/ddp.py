"""DDP: every rank holds the whole model; gradients are averaged bucket by bucket during backward."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launch.engines.replica import ReplicaEngine
from launch.training.config import RunConfig
from launch.training.world import World
from runtime.collectives import ledger
from runtime.collectives.attach.ddp import attach_ddp
from runtime.collectives.codec import WireSpec


class DdpEngine(ReplicaEngine):
    """DistributedDataParallel around the model in training; the model itself in evaluation."""

    def __init__(self, model: nn.Module, config: RunConfig, wire: WireSpec | None, world: World) -> None:
        self._ddp = DistributedDataParallel(model.to(world.device), gradient_as_bucket_view=True)
        super().__init__(model, config, wire, world)
        attach_ddp(self._ddp, wire, self._counter)

    @property
    def name(self) -> str:
        return "ddp"

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        if not self._model.training:
            return super().forward(inputs)
        logits: Tensor = self._ddp(**inputs).logits
        return logits

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._ddp.no_sync()

    def uncompressed_bytes(self, dtype: torch.dtype) -> int:
        shapes = [parameter.shape for parameter in self._parameters]
        return ledger.predict_all_reduce(shapes, dtype, None, self._world.size).total
