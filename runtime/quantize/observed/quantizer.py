"""Observed: a scale per tensor that follows from the steps before; each rule is a file beside this one.

    the scale of a step      `in_force`, a buffer, which moves only at the end of a step (end_step.py)
    before the first one     that of the present tensor, as if the rule were amax: of a site reached late too
    what a step has seen     the largest finite max |x| of all its micro-batches and of all calls of the site; no part
                             of a checkpoint, for after the end of a step there is none

So casts of one step have one scale, and what is recomputed has the scale that it had. The buffers stay fp32 whatever
the model is cast to, since a scale is a number of its own.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from runtime.kernels.cast.scales import compute_scale
from runtime.kernels.fake import has_values
from runtime.numerics.format_kinds import filled_to
from runtime.numerics.formats import get_format
from runtime.numerics.quantizer_specs import ObservedSpec, QuantizerSpec
from runtime.numerics.specs import QuantSpec, ScaleRule, ScaleSpec
from runtime.quantize.qtensor import CastKey
from runtime.quantize.stateful import Stateful

NOTHING = -1.0
"""Of a step in which nothing was seen; zeros are seen as 0."""


class Observed(Stateful):
    """`in_force` (): the scale by which values are divided, fp32; 0: nothing was seen yet."""

    in_force: Tensor
    first_rule: ScaleRule = "amax"
    """How the scale of the present tensor is chosen where there is none in force."""

    def __init__(self, spec: QuantSpec, owner: str, is_weight: bool) -> None:
        super().__init__(spec, owner, is_weight)
        self.largest = filled_to(get_format(spec.format))
        self.register_buffer("in_force", torch.zeros(()))
        self._present = replace(spec, quantizer=None, scale=ScaleSpec("tensor", self.first_rule))
        self._seen: float | Tensor = NOTHING
        self._given: tuple[float, Tensor, CastKey | None] = (0.0, torch.zeros(()), None)
        self._version_read = -1

    @property
    def rule(self) -> ObservedSpec:
        """What the policy says of it."""
        assert self.spec.quantizer is not None
        assert not isinstance(self.spec.quantizer, QuantizerSpec)
        return self.spec.quantizer

    @property
    def is_waiting(self) -> bool:
        """Whether it has seen no step, and casts by the scale of the present tensor."""
        return not self.in_force.is_meta and float(self.in_force) == 0

    @property
    def key(self) -> CastKey:
        """Of casts under the scale in force; two quantizers of one spec and one scale make one cast of one tensor."""
        return self.keyed(self.scale_in_force())

    def keyed(self, scale: Tensor | None) -> CastKey:
        """Of a cast under this scale; of one that may not be looked at it is the owner's alone."""
        if scale is None or not scale.is_cpu:
            return CastKey(self.spec, self.owner, self.in_force._version)
        _, given, key = self._given
        if key is None or given is not scale:
            key = CastKey(self.spec, "", int(scale.view(torch.int32)))
            if given is scale:
                self._given = (self._given[0], given, key)
        return key

    def scale_in_force(self) -> Tensor | None:
        """The scale of this step, as a tensor that no later step writes into; None where nothing was seen yet."""
        buffer = self._buffers["in_force"]  # as an attribute it takes a search through the module
        assert buffer is not None
        if not buffer.is_cpu and buffer._version == self._version_read:  # nobody waits for a device that wrote nothing
            return self._given[1] if self._given[0] > 0.0 else None
        now, self._version_read = float(buffer), buffer._version
        if now != self._given[0]:
            with torch.inference_mode(False):
                self._given = (now, buffer.detach().clone(), None)
        return self._given[1] if now > 0.0 else None

    def scale(self, x: Tensor) -> Tensor:
        """That with which x is cast now."""
        buffer = self._buffers["in_force"]
        if not has_values(x) or buffer is None or buffer.is_meta:
            return torch.empty((), dtype=torch.float32, device=x.device)
        found = self.scale_in_force()
        return self.present(x) if found is None else found

    def present(self, x: Tensor) -> Tensor:
        """That of x itself."""
        found = compute_scale(x.detach(), self._present)
        assert found is not None
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x)

    def note(self, x: Tensor, amax: Tensor) -> None:
        """x was cast in this step, its largest magnitude is `amax`, fp32 (); one that is not finite says nothing."""
        if isinstance(self._seen, float) and amax.is_cpu:
            value = float(amax)
            if math.isfinite(value) and value > self._seen:
                self._seen = value
            return
        seen = self._seen if isinstance(self._seen, Tensor) else amax.new_full((), self._seen)
        self._seen = torch.maximum(seen, torch.where(amax.isfinite(), amax, NOTHING))

    def take_seen(self) -> float | Tensor:
        """What was seen since this was asked last."""
        seen, self._seen = self._seen, NOTHING
        return seen

    @abstractmethod
    def end_step(self, amax: float) -> str:
        """A step in which the largest magnitude was `amax`, 0 or more, is over. What must be told of it, or ""."""

    def put_in_force(self, scale: float) -> None:
        """The scale of the next step."""
        self.in_force.fill_(scale)
        if not self.in_force.is_cpu:
            self._given, self._version_read = (scale, self.in_force.clone(), None), self.in_force._version

    def drop_seen(self) -> None:
        """What was seen in this step says nothing."""
        self._seen = NOTHING

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for each in self.buffers():
                each.zero_()
        self.drop_seen()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Where `fn` puts tensors, and not in the dtype that it casts them to."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            moved = fn(buffer)
            self._buffers[name] = moved.to(buffer.dtype) if buffer.is_meta else buffer.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            assert buffer is not None
            if isinstance(given, Tensor) and given.shape != buffer.shape:
                rest[-1].append(
                    f"{prefix}{name}: the state of another recipe. Expected {tuple(buffer.shape)}, as "
                    f"{self.spec.quantizer} says. Got {tuple(given.shape)}."
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)
