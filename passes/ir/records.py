"""Records: what a text says of a program beside its graphs, and what is wrong with it. Each function gives what is
expected, or "" if nothing is wrong.

    device     a type of device that torch has                    passes    passes that there are, with their options
    choice     a kernel of runtime/kernels/registry.py, its backend, and how exact it is
"""

from collections.abc import Mapping
from typing import Any, get_args

import torch

from passes.manager import parse_passes
from passes.pipelines import PASSES
from runtime.errors import PassError
from runtime.kernels.registry import Choice, Fidelity, kernels


def wrong_device(text: str) -> str:
    try:
        return "" if torch.device(text).type == text else "a type of device without its number"
    except RuntimeError:
        return "a type of device, such as cpu or cuda"


def wrong_passes(text: str) -> str:
    try:
        parse_passes(text, PASSES)
    except PassError as error:
        return f"passes that there are: {error}"
    return ""


def wrong_choice(choice: Mapping[str, Any]) -> str:
    if choice.keys() != Choice.__dataclass_fields__.keys():
        return ", ".join(Choice.__dataclass_fields__)
    known = {
        "backend": sorted({kernel.backend for kernel in kernels()}),
        "kernel": [kernel.name for kernel in kernels()],
        "fidelity": get_args(Fidelity),
    }
    for field, values in known.items():
        if choice[field] not in values:
            return f"{field} {' or '.join(values)}"
    return ""
