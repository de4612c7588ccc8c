"""CIFAR-10 as its authors hand it out: a folder of pickles, data_batch_1 ... data_batch_5 and test_batch.

A pickle can run what it names, so nothing is looked up but what an array is made of.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.training.config import ConfigError
from launch.training.images.source import Source, in_memory, sha256_of

_TRAIN, _TEST = tuple(f"data_batch_{number}" for number in range(1, 6)), "test_batch"
_ROW = 3 * 32 * 32
_ALLOWED = {
    **{
        (f"numpy.{core}.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0]
        for core in ("core", "_core")
    },
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}  # fmt: skip


class _ArraysOnly(pickle.Unpickler):
    """Reads plain values and arrays. UnpicklingError for every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: bytes(str(text), str(encoding))
        raise pickle.UnpicklingError(f"{module}.{name}, where only arrays are read")


def cifar10_folder(folder: Path) -> Path | None:
    """`folder`, or cifar-10-batches-py in it, if that is a folder of CIFAR-10's batches."""
    for each in (folder, folder / "cifar-10-batches-py"):
        if (each / _TRAIN[0]).is_file() and (each / _TEST).is_file():
            return each
    return None


def cifar10(folder: Path) -> Source:
    """The batches that are there: all five are 50000 pictures. ConfigError for a file that is not one."""
    batches = [_read(folder / name) for name in _TRAIN if (folder / name).is_file()]
    pixels_NCHW, labels_N = torch.cat([each[0] for each in batches]), torch.cat([each[1] for each in batches])
    test_NCHW, test_labels_N = _read(folder / _TEST)
    return Source(
        name=f"CIFAR-10 of {folder}, {len(labels_N)} to train and {len(test_labels_N)} to validate",
        sha256=sha256_of(pixels_NCHW, labels_N, test_NCHW, test_labels_N),
        train=in_memory(pixels_NCHW, labels_N),
        validation=in_memory(test_NCHW, test_labels_N),
        classes=10,
        channels=3,
        size=32,
    )


def _read(file: Path) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, 32, 32), uint8, and labels of one batch."""
    try:
        with file.open("rb") as opened:
            batch = _ArraysOnly(opened, encoding="bytes").load()
        pixels, labels = batch[b"data"], np.asarray(batch[b"labels"])
        is_sound = pixels.dtype == np.uint8 and pixels.shape == (len(labels), _ROW) and len(labels) > 0
        if not is_sound or labels.dtype.kind != "i" or labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"pixels {pixels.dtype} {pixels.shape}, labels {labels.dtype} {labels.shape}")
    except OSError as error:
        raise ConfigError("this batch cannot be read", where=str(file), got=error.strerror or "no bytes") from None
    except Exception as error:  # whatever a file that is no pickle makes of the reader
        got = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise ConfigError(
            "this is no batch of CIFAR-10",
            where=str(file),
            expected="a pickle of data (N x 3072, uint8) and labels (0 to 9)",
            got=got,
        ) from None
    return torch.from_numpy(pixels.copy()).reshape(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))
