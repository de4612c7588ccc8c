"""CIFAR-10's batches: pixels in their order, and a pickle that names anything but arrays is refused unread."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.training.config import ConfigError, RunConfig
from launch.training.images.cifar10 import cifar10, cifar10_folder
from launch.training.images.image_set import load_images

DRAW = np.random.default_rng(0)


def write(folder: Path, names: tuple[str, ...] = ("data_batch_1", "data_batch_2", "test_batch")) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in names:
        batch = {
            b"data": DRAW.integers(0, 256, (10, 3072)).astype(np.uint8),
            b"labels": list(range(10)),
            b"batch_label": b"x",
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        written[name] = batch
    return written


def test_pixels_and_labels(tmp_path: Path) -> None:
    written = write(tmp_path / "cifar-10-batches-py")
    for place in (tmp_path, tmp_path / "cifar-10-batches-py"):
        found = cifar10_folder(place)
        assert found is not None
        source = cifar10(found)
        assert (len(source.train), len(source.validation), source.size, source.channels) == (20, 10, 32, 3)
        red = source.train.fetch(torch.tensor([10]))[0, 0]
        assert red[0].tolist() == written["data_batch_2"][b"data"][0, :32].tolist(), "the first 32 bytes: row 0 in red"
        assert source.train.labels_N.tolist() == [*range(10), *range(10)]
    assert cifar10_folder(tmp_path / "cifar-10-batches-py" / "data_batch_1") is None


def test_a_config_names_the_folder(tmp_path: Path) -> None:
    write(tmp_path)
    images = load_images(RunConfig(model="resnet", data=str(tmp_path), batch=4))
    x_BCHW, _ = images.batch(RunConfig(model="resnet", batch=4), 0, 0, 0)
    assert x_BCHW.shape == (4, 3, 32, 32)
    assert images.sizes == {"classes": 10, "channels": 3, "size": 32}
    assert images.content_sha256 != load_images(RunConfig(model="resnet", data=str(_other(tmp_path)))).content_sha256


def _other(tmp_path: Path) -> Path:
    write(tmp_path / "other")
    return tmp_path / "other"


class Evil:
    """A pickle that runs a command as it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_pickle_that_runs_something_is_refused_unread(tmp_path: Path) -> None:
    write(tmp_path)
    mark = tmp_path / "it-ran"
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil(f"touch {mark}"), b"labels": []}))
    with pytest.raises(
        ConfigError, match=r"test_batch: this is no batch of CIFAR-10.*system, where only arrays are read"
    ):
        cifar10(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "batch",
    [
        {b"data": np.zeros((10, 3000), np.uint8), b"labels": [0] * 10},
        {b"data": np.zeros((10, 3072), np.float32), b"labels": [0] * 10},
        {b"data": np.zeros((10, 3072), np.uint8), b"labels": [0] * 9},
        {b"data": np.zeros((10, 3072), np.uint8), b"labels": [11] * 10},
        {b"data": np.zeros((10, 3072), np.uint8)},
        [1, 2],
    ],
)
def test_what_is_no_batch_is_refused(tmp_path: Path, batch: Any) -> None:
    write(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ConfigError, match=r"data_batch_2: this is no batch of CIFAR-10. Expected a pickle of data"):
        cifar10(tmp_path)


def test_what_is_no_pickle_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02 no pickle")
    with pytest.raises(ConfigError, match="this is no batch of CIFAR-10"):
        cifar10(tmp_path)
