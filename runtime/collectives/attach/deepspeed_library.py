"""The deepspeed library, which is optional: the only file that imports it."""

import importlib
from typing import Any

from runtime.errors import WireError


def load(name: str) -> Any:
    """A module of DeepSpeed by its name. WireError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise WireError(
            "the DeepSpeed engine needs deepspeed", got=str(error), hint="pip install 'lpcompile[deepspeed]'"
        ) from error
