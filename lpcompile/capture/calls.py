"""Calls: what the calls of a model shown so far gave, per module: its recordings, or why it has none, or neither.

A module keeps a few variants, one per kind of call (training and evaluation, with a mask and without, another dtype),
and tries them in order; a call that none fits runs the original forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lpcompile.capture.precedents import Precedents
from lpcompile.capture.recorder import record
from lpcompile.capture.recording import Opaque, Recording, merged
from lpcompile.frontends.leaves.find import is_leaf

MAX_VARIANTS = 8
"""Per module. Each costs a check of a few microseconds in every call that an earlier one does not fit."""


@dataclass(frozen=True)
class Calls:
    """Recordings of no call at all, of one, or of several; paths are those of modules in the model."""

    num: int = 0
    recordings: Mapping[str, list[Recording]] = field(default_factory=dict)
    opaque: Mapping[str, Opaque | str] = field(default_factory=dict)
    """Modules whose forward in some call no graph stands for, with the reason."""
    reached: frozenset[str] = frozenset()
    """Modules that were called, leaves included."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calls":
        return self  # nothing in it belongs to one model

    def __add__(self, more: "Calls") -> "Calls":
        """Variants of `self` come first, and are tried first. What exceeds MAX_VARIANTS is left out, and told."""
        recordings = {**self.recordings}
        opaque = {**self.opaque, **more.opaque}
        for path, found in more.recordings.items():
            variants = merged(self.recordings.get(path, []), found)
            if len(variants) > MAX_VARIANTS:
                over = len(variants) - MAX_VARIANTS
                opaque[path] = f"{over} more kinds of call than the {MAX_VARIANTS} kept; they run the original forward"
            recordings[path] = variants[:MAX_VARIANTS]
        return Calls(self.num + more.num, recordings, opaque, self.reached | more.reached)


def record_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str) -> Calls:
    """One call in evaluation mode and, for mode="train", one in training mode before it; for mode="infer" without
    gradients, as it will be called.
    """
    calls = Calls()
    modes = [(module, module.training) for module in model.modules()]
    precedents = Precedents()
    try:
        for training in (True, False) if mode == "train" else (False,):
            if model.training is not training:
                model.train(training)
            with torch.set_grad_enabled(mode == "train" and torch.is_grad_enabled()):
                result = record(model, args, kwargs, is_leaf=is_leaf, precedents=precedents)
            calls += Calls(1, result.recordings, result.opaque, result.reached)
    finally:
        for module, was_training in modes:
            module.training = was_training
    return calls
