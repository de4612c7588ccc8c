"""Dataset: what a run asks of its data, be it text (data.py) or pictures (images/), and which a config means."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from launch.training.config import RunConfig
from launch.training.data import check_data, load_corpus
from launch.training.images.image_set import load_images
from launch.training.models.registry import reads_images


class Dataset(Protocol):
    """Batches are a pure function of what they are asked for: a resumed run sees what an uninterrupted one saw."""

    @property
    def name(self) -> str:
        """What it is, for people."""

    @property
    def sha256(self) -> str:
        """Of what was read."""

    @property
    def content_sha256(self) -> str:
        """Of what a run makes of it: what a resumed run and the other ranks must have too."""

    @property
    def skipped(self) -> int:
        """Files of a folder that were left out."""

    @property
    def unit(self) -> str:
        """What a loss is the mean over: `token`, `image`."""

    @property
    def bytes_per_unit(self) -> float | None:
        """Of the validation split: what turns nats per unit into nats per byte. None of what is no text."""

    @property
    def bigram(self) -> float | None:
        """Nats per byte of a byte-bigram model on the validation split. None of what is no text."""

    @property
    def sizes(self) -> dict[str, int]:
        """What the model must be built for, by the names of its builder's arguments."""

    def units_per_row(self, config: RunConfig) -> int:
        """Tokens of a window; 1 of pictures."""

    def batch(self, config: RunConfig, step: int, micro: int, rank: int, world: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one micro-batch of one rank."""

    def validation_batches(self, config: RunConfig, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Inputs, targets and how many rows count: as many batches on every rank, everything once."""


def load_dataset(config: RunConfig) -> Dataset:
    """What a config names. Raises ConfigError."""
    return load_images(config) if reads_images(config.model) else load_corpus(config)


def check_dataset(config: RunConfig) -> str | None:
    """What can be said before a worker starts: the sha256 of the content, where it is known without tokenizing."""
    return load_images(config).content_sha256 if reads_images(config.model) else check_data(config)
