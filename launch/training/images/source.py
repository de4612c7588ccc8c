"""Source: pictures with labels, in two splits. `fetch` is asked for the few that a batch holds, so that they may lie
on disk.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Invariant: `fetch(rows_B)` is uint8 of shape (B, C, H, W), the same for the same rows."""

    labels_N: Tensor  # int64, 0 ... classes - 1
    fetch: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class Source:
    """Pictures to train on and pictures to validate on."""

    name: str  # what they are, for people
    sha256: str  # of all that decides what a batch holds
    train: Split
    validation: Split
    classes: int
    channels: int
    size: int  # pixels; pictures are square
    skipped: int = 0  # files of a folder left out because they are no pictures


def in_memory(pixels_NCHW: Tensor, labels_N: Tensor) -> Split:
    return Split(labels_N.long(), lambda rows_B: pixels_NCHW[rows_B])


def sha256_of(*tensors: Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def stratified(labels_N: Tensor, train: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to validate on, each in order: of every class the same share, by a fixed draw."""
    generator = torch.Generator().manual_seed(0)
    order_N = torch.randperm(len(labels_N), generator=generator)
    share = train / len(labels_N)
    chosen = []
    for label in labels_N.unique():
        rows = order_N[labels_N[order_N] == label]
        chosen.append(rows[: round(share * len(rows))])
    in_train_N = torch.zeros(len(labels_N), dtype=torch.bool)
    in_train_N[torch.cat(chosen)] = True
    return in_train_N.nonzero().flatten(), (~in_train_N).nonzero().flatten()
