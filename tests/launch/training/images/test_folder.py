"""Folders of pictures: classes by name, splits by folder or by a fixed draw, one size; what is wrong is told."""

from pathlib import Path

import pytest
import torch

from launch.training.config import ConfigError, RunConfig
from launch.training.images.folder import image_folder
from launch.training.images.image_set import load_images

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
COLORS = {"blue": (0, 0, 250), "green": (0, 200, 0), "red": (240, 0, 0)}


def write(folder: Path, count: int, size: tuple[int, int] = (12, 9), classes: tuple[str, ...] = tuple(COLORS)) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", size, COLORS[name]).save(folder / name / f"{number}.png")
    return folder


def test_train_and_val_folders(tmp_path: Path) -> None:
    write(tmp_path / "train", 4)
    write(tmp_path / "val", 2, (20, 31))
    (tmp_path / "train" / "red" / "notes.txt").write_text("no picture")
    source = image_folder(tmp_path, 8)
    assert (source.classes, source.channels, source.size, source.skipped) == (3, 3, 8, 1)
    assert (len(source.train), len(source.validation)) == (12, 6)
    for split in (source.train, source.validation):
        pixels = split.fetch(torch.arange(len(split)))
        assert pixels.shape == (len(split), 3, 8, 8)
        for picture, label in zip(pixels, split.labels_N.tolist()):
            assert tuple(picture[:, 4, 4].tolist()) == COLORS[sorted(COLORS)[label]]


def test_one_folder_is_split_in_every_class(tmp_path: Path) -> None:
    source = image_folder(write(tmp_path, 10), 8)
    assert source.train.labels_N.bincount().tolist() == [9, 9, 9]
    assert source.validation.labels_N.bincount().tolist() == [1, 1, 1]


def test_the_middle_is_cut_out(tmp_path: Path) -> None:
    """A picture twice as wide as high, its left and right quarter white: the middle alone is seen."""
    write(tmp_path, 10)
    picture = Image.new("RGB", (32, 16), (255, 255, 255))
    picture.paste((10, 20, 30), (8, 0, 24, 16))
    picture.save(tmp_path / "blue" / "0.png")
    source = image_folder(tmp_path, 16)
    pixels = torch.cat([split.fetch(torch.arange(len(split))) for split in (source.train, source.validation)])
    assert any(torch.equal(each, torch.tensor([10, 20, 30]).byte()[:, None, None].expand(3, 16, 16)) for each in pixels)


def test_a_grey_and_a_palette_picture_are_rgb(tmp_path: Path) -> None:
    write(tmp_path, 10)
    Image.new("L", (9, 9), 77).save(tmp_path / "red" / "0.png")
    Image.new("P", (9, 9)).save(tmp_path / "red" / "1.gif")
    source = image_folder(tmp_path, 8)
    assert source.train.fetch(torch.arange(len(source.train))).shape[1] == 3


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "these are not pictures of two classes and more"),
        (lambda folder: write(folder, 3, classes=("red",)), "Got 1 folders with pictures"),
        (lambda folder: (write(folder / "train", 2, classes=("red", "blue")), write(folder / "val", 2)),
         'no picture to train on is of class "green"'),
    ],
)  # fmt: skip
def test_what_is_no_folder_of_classes_is_told(tmp_path: Path, make: object, sentence: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=sentence):
        load_images(RunConfig(model="resnet", data=str(tmp_path)))


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    write(tmp_path, 10)
    for number in range(10):
        (tmp_path / "red" / f"{number}.png").write_bytes(b"no picture")
    source = image_folder(tmp_path, 8)
    split = source.train
    rows = [row for row in range(len(split)) if int(split.labels_N[row]) == 2]
    with pytest.raises(ConfigError, match=r"red.\d\.png: this picture cannot be read"):
        split.fetch(torch.tensor(rows))


def test_its_sha256_is_of_names_sizes_and_the_size_asked_for(tmp_path: Path) -> None:
    write(tmp_path, 10)
    first = image_folder(tmp_path, 8).sha256
    assert image_folder(tmp_path, 8).sha256 == first
    assert image_folder(tmp_path, 16).sha256 != first
    (tmp_path / "red" / "0.png").rename(tmp_path / "red" / "x.png")
    assert image_folder(tmp_path, 8).sha256 != first
