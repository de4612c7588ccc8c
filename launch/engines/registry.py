"""The engines by name. A new one is a file here and its row; what a row names is imported when it is asked for, since
DeepSpeed is optional.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.engines.engine import AbstractEngine

ENGINES = {
    "deepspeed": "launch.engines.deepspeed:DeepSpeedEngine",
    "ddp": "launch.engines.ddp:DdpEngine",
    "none": "launch.engines.none:NoEngine",
}
"""Name -> `module:class`. The class is made of (model, config, wire or None, world)."""


def known_engine(name: str) -> str:
    """The name, if it is a row's. ValueError for others, as a field's validator raises it."""
    if name not in ENGINES:
        raise ValueError(f"one of {', '.join(ENGINES)}")
    return name


def engine_class(name: str) -> "type[AbstractEngine]":
    """The class of a row."""
    module, _, attribute = ENGINES[name].partition(":")
    found: type[AbstractEngine] = getattr(import_module(module), attribute)
    return found
