"""The models by name. A new one is a file here and its row; what a row names is imported when it is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lpcompile.errors import nearest_names

Reads = Literal["text", "images"]


@dataclass(frozen=True)
class ModelRow:
    """One family. `build` is called with the config and the sizes of its data, as keywords."""

    build: str  # `module:function`
    reads: Reads
    input_name: str  # the keyword of its forward; what that returns has `.logits`
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of the config, where they are not everybody's


_OF_IMAGES = {"width": 16, "batch": 32}

MODELS = {
    "gpt": ModelRow("launch.training.models.gpt:gpt", "text", "input_ids"),
    "llama": ModelRow("launch.training.models.llama:llama", "text", "input_ids"),
    "resnet": ModelRow("launch.training.models.resnet:resnet", "images", "pixel_values", _OF_IMAGES),
    "mobilenet": ModelRow("launch.training.models.mobilenet:mobilenet", "images", "pixel_values", _OF_IMAGES),
}
MODEL_NAMES = tuple(MODELS)
"""Every model that `train` knows."""


def known_model(name: str) -> str:
    """The name, if it is a row's. ValueError for others, as a field's validator raises it."""
    if name not in MODELS:
        guess, known = nearest_names(name, MODEL_NAMES).rpartition("Known: ")[::2]
        raise ValueError(f"one of {known}" + (f"; did you mean {guess.strip()}" if guess else ""))
    return name


def reads_images(name: str) -> bool:
    return MODELS[name].reads == "images"
