"""Engine: what holds the replicas of a model together. One interface; the engines are in registry.py.

forward -> backward (reduces gradients) -> step (clips, updates) ; save and load write and read this rank's share
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from launch.training.config import RunConfig
from launch.training.world import World
from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import WireCounter


class AbstractEngine(ABC):
    """A replica of the model with its optimizer. Called by all ranks in step.

    Loss scaling is not an engine's business: the gradients it reduces and clips are unscaled already.
    """

    @abstractmethod
    def __init__(self, model: nn.Module, config: RunConfig, wire: WireSpec | None, world: World) -> None:
        """Takes the compiled model. `wire` None: gradients travel as they are, and are only counted."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call it in a table: `ddp`, `deepspeed ZeRO-2`."""

    @property
    @abstractmethod
    def counter(self) -> WireCounter:
        """The bytes this rank has sent for gradients and parameters, step by step."""

    @abstractmethod
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits, the classes last, of the keywords of the model's forward; trains or evaluates as its mode says."""

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch; `last` is the one before step()."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss / grad_accumulation` to this step's."""

    @abstractmethod
    def step(self, lr: float, skip: bool) -> float | None:
        """Clips and updates with learning rate `lr`; `skip` drops the gradients and changes nothing.

        Returns the norm of the gradients before clipping where the engine knows it.
        """

    @abstractmethod
    def uncompressed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes this rank would send for gradients per step as numbers of `dtype`, by the ledger."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes this rank's share of weights and optimizer state below `folder`, which exists."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Reads what save() wrote."""


def clip_norm(parameters: list[nn.Parameter], largest: float) -> float:
    """Clips the gradients to a global norm of `largest` (0: no clipping) and returns the norm they had."""
    norm = nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else float("inf"))
    return norm.item()
