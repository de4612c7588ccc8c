"""Folder: pictures on disk, one folder a class, as ImageNet is laid out.

    DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg      (also: validation, test)
    DATA/CLASS/*.png                                      a tenth of each class, by a fixed draw, validates

A picture is read when a batch needs it: scaled so that its shorter side is `size`, the middle cut out, in RGB.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.training.config import ConfigError
from launch.training.images.source import Source, Split, stratified

_ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_OF_VALIDATION = ("val", "validation", "test")
_TRAIN_SHARE = 0.9


def image_folder(folder: Path, size: int) -> Source:
    """The pictures below a folder. ConfigError where there are none, one class alone, or classes that differ."""
    pillow()
    train, skipped = _listed(folder / "train" if (folder / "train").is_dir() else folder)
    validation: list[Path] = []
    held_out = next((folder / name for name in _OF_VALIDATION if (folder / name).is_dir()), None)
    classes = sorted({file.parent.name for file in train})
    if (folder / "train").is_dir() and held_out:
        validation, more = _listed(held_out)
        skipped += more
        unknown = sorted({file.parent.name for file in validation} - set(classes))
        if unknown:
            raise ConfigError(f'no picture to train on is of class "{unknown[0]}"', where=str(held_out / unknown[0]))
    elif train:
        labels_N = _labels(train, classes)
        rows, others = stratified(labels_N, round(_TRAIN_SHARE * len(train)))
        train, validation = [train[row] for row in rows], [train[row] for row in others]
    if len(classes) < 2 or not validation or not train:
        raise ConfigError(
            "these are not pictures of two classes and more",
            where=f"--data {folder}",
            expected="a folder of pictures for each class, or train/ and val/ with such folders",
            got=f"{len(classes)} folders with pictures, {len(train)} to train and {len(validation)} to validate",
        )
    total = hashlib.sha256(f"{size}".encode())
    for file in (*train, *validation):
        total.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
    return Source(
        name=f"{folder}, {len(classes)} classes, {len(train)} to train and {len(validation)} to validate",
        sha256=total.hexdigest(),
        train=_split(train, classes, size),
        validation=_split(validation, classes, size),
        classes=len(classes),
        channels=3,
        size=size,
        skipped=skipped,
    )


def pillow() -> Any:
    """PIL.Image. ConfigError with the command that installs it."""
    try:
        from PIL import Image  # here: pictures on disk alone need it
    except ImportError:
        hint = "pip install pillow"
        raise ConfigError("pictures are read by Pillow, which is not installed", where="--data", hint=hint) from None
    return Image


def _listed(folder: Path) -> tuple[list[Path], int]:
    """Pictures of the class folders, in the order of their paths, and how many other files lie beside them."""
    files = [
        file for file in sorted(folder.glob("*/**/*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]  # fmt: skip
    pictures = [file for file in files if file.suffix.lower() in _ENDINGS and file.parent.parent == folder]
    return pictures, len(files) - len(pictures)


def _labels(files: list[Path], classes: list[str]) -> Tensor:
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[file.parent.name] for file in files], dtype=torch.long)


def _split(files: list[Path], classes: list[str], size: int) -> Split:
    return Split(
        _labels(files, classes), lambda rows_B: torch.stack([_picture(files[row], size) for row in rows_B.tolist()])
    )


def _picture(file: Path, size: int) -> Tensor:
    """uint8 of shape (3, size, size)."""
    image = pillow()
    try:
        with image.open(file) as opened:
            picture = opened.convert("RGB")
    except Exception as error:  # Pillow raises what the decoder at hand does
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise ConfigError("this picture cannot be read", where=str(file), got=reason) from None
    scale = size / min(picture.size)
    width, height = (max(size, round(scale * side)) for side in picture.size)
    picture = picture.resize((width, height), image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, 3).permute(2, 0, 1).contiguous()
