"""Image set: batches of pictures, a pure function of (seed, step, micro-batch, rank, number of ranks).

    position in the run -> epoch, place in it -> that epoch's permutation -> pixels, maybe moved and mirrored -> x_BCHW

Every epoch is a permutation of the pictures to train on; a batch may end in the next. Pixels are fp32, of mean 0 and
deviation 1 in each channel over the pictures to train on (over the first 1000 of a draw, where there are more).
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from launch.training.config import ConfigError, RunConfig
from launch.training.images.cifar10 import cifar10, cifar10_folder
from launch.training.images.folder import image_folder
from launch.training.images.packaged import PACKAGED, packaged
from launch.training.images.source import Source, Split
from lpcompile.errors import did_you_mean, nearest_names

DEFAULT = "digits"
_MEASURED = 1000
_DEFAULT_SIZE = 224


@dataclass(frozen=True)
class ImageSet:
    """Pictures as a run reads them."""

    source: Source
    mean_C: Tensor
    deviation_C: Tensor

    unit = "image"
    bytes_per_unit = bigram = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def sha256(self) -> str:
        return self.source.sha256

    content_sha256 = sha256

    @property
    def skipped(self) -> int:
        return self.source.skipped

    @property
    def sizes(self) -> dict[str, int]:
        return {"classes": self.source.classes, "channels": self.source.channels, "size": self.source.size}

    def units_per_row(self, config: RunConfig) -> int:
        return 1

    def batch(self, config: RunConfig, step: int, micro: int, rank: int, world: int = 1) -> tuple[Tensor, Tensor]:
        """x_BCHW and y_B of one micro-batch of one rank."""
        turn = (step * config.grad_accumulation + micro) * world + rank
        rows_B = torch.tensor(
            [
                _permutation(config.seed, place // len(self.source.train), len(self.source.train))[
                    place % len(self.source.train)
                ]
                for place in range(turn * config.batch, (turn + 1) * config.batch)
            ]
        )
        pixels_BCHW = self.source.train.fetch(rows_B)
        if config.augment == "crop-flip":
            pixels_BCHW = crop_and_flip(pixels_BCHW, _generator(f"augment/{config.seed}/{turn}"))
        return self._normal(pixels_BCHW), self.source.train.labels_N[rows_B]

    def validation_batches(self, config: RunConfig, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """x_BCHW, y_B and how many of their pictures count: as many batches on every rank, each picture once."""
        total = len(self.source.validation)
        for turn in range(math.ceil(total / (config.batch * world))):
            first = (turn * world + rank) * config.batch
            rows_B = torch.arange(first, first + config.batch).clamp(max=total - 1)
            counted = max(0, min(config.batch, total - first))
            pixels_BCHW = self.source.validation.fetch(rows_B)
            yield self._normal(pixels_BCHW), self.source.validation.labels_N[rows_B], counted

    def _normal(self, pixels_BCHW: Tensor) -> Tensor:
        return (pixels_BCHW.float() - self.mean_C[:, None, None]) / self.deviation_C[:, None, None]


def load_images(config: RunConfig) -> ImageSet:
    """The pictures that a config names: `digits`, `mnist`, a folder of CIFAR-10's batches, or folders of classes."""
    source = _source(config)
    pixels_NCHW = source.train.fetch(_measured_rows(source.train)).double()
    deviation_C = pixels_NCHW.std(dim=(0, 2, 3))
    return ImageSet(source, pixels_NCHW.mean(dim=(0, 2, 3)).float(), deviation_C.clamp(min=1.0).float())


def crop_and_flip(pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to an eighth of its size, with zeros where it was not, and mirrored half of the time."""
    batch, _, height, width = pixels_BCHW.shape
    margin = max(1, height // 8)
    wide_BCHW = pad(pixels_BCHW, (margin,) * 4)
    tops_B, lefts_B = torch.randint(0, 2 * margin + 1, (2, batch), generator=generator).tolist()
    is_flipped_B = (torch.rand(batch, generator=generator) < 0.5).tolist()
    moved = [
        wide_BCHW[row, :, top : top + height, left : left + width]
        for row, (top, left) in enumerate(zip(tops_B, lefts_B, strict=True))
    ]
    return torch.stack([each.flip(-1) if flip else each for each, flip in zip(moved, is_flipped_B, strict=True)])


def _source(config: RunConfig) -> Source:
    data = config.data or DEFAULT
    if data in PACKAGED:
        return packaged(data)
    path = Path(data)
    if path.is_dir():
        found = cifar10_folder(path)
        return cifar10(found) if found else image_folder(path, config.image_size or _DEFAULT_SIZE)
    what = "this is a file and not a folder of pictures" if path.exists() else "these images are not known"
    raise ConfigError(
        did_you_mean(what, nearest_names(data, PACKAGED)),
        where=f"--data {data}",
        expected=f"{', '.join(PACKAGED)}, a folder of CIFAR-10's batches, or a folder with one folder a class",
    )


def _measured_rows(split: Split) -> Tensor:
    if len(split) <= _MEASURED:
        return torch.arange(len(split))
    return torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:_MEASURED]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=_generator(f"{seed}/{epoch}")).tolist()
    return order


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
