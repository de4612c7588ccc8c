"""Precedents: finished calls whose scripts a call of an equal module may follow (script.py).

Equal is: one class with equal children, parameters of equal shape, dtype and device, and arguments whose sizes begin as
the same symbols. It only says where to look; whether the two calls do the same is found out operation by operation.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils._pytree import TreeSpec

from lpcompile.capture.recording import Recording
from lpcompile.capture.script import Script


@dataclass(frozen=True)
class Precedent:
    """A finished call that others may follow: its script, its guard's demands, and what came of it."""

    script: Script
    in_spec: TreeSpec
    recording: Recording
    state: tuple[int, int]
    """Of the script when the call had ended: a later condition is not its own."""


@dataclass
class Precedents:
    """Finished calls by what is known of a call beforehand: structure of the module, and a key of the arguments."""

    _by_key: dict[Any, list[Precedent]] = field(default_factory=dict)
    _signatures: dict[Any, int] = field(default_factory=dict)

    def find(self, module: nn.Module, key: Any, in_spec: TreeSpec) -> Precedent | None:
        """The best to follow: one that read the attributes which this module has; in the same training mode if any."""
        for training in (module.training, not module.training):
            for precedent in self._by_key.get((*key, training), ()):
                if (
                    precedent.script.is_good
                    and precedent.in_spec == in_spec
                    and precedent.recording.guard.differing_attribute(module) is None
                ):
                    return precedent
        return None

    def add(self, module: nn.Module, key: Any, precedent: Precedent) -> None:
        self._by_key.setdefault((*key, module.training), []).append(precedent)

    def signatures(self, model: nn.Module) -> dict[int, int]:
        """One number per module, by id: equal for modules of one class with equal parameters and equal children."""
        found: dict[int, int] = {}

        def visit(module: nn.Module) -> int:
            if id(module) not in found:
                children = tuple((name, visit(child)) for name, child in module._modules.items() if child is not None)
                tensors = tuple(
                    (name, tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)
                    for name, tensor in (*module._parameters.items(), *module._buffers.items())
                    if tensor is not None
                )
                found[id(module)] = self._signatures.setdefault(
                    (type(module), children, tensors), len(self._signatures)
                )
            return found[id(module)]

        visit(model)
        return found
