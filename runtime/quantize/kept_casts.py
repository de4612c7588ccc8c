"""Constants: the casts of weights that are kept, and when a kept cast stands for casting again.

A cast is kept under the bytes of what was cast, its fingerprint, shape, strides and dtype, and under the key of the
cast. Every use reads the weight once to take its fingerprint, and finds the cast of these very bytes or casts again; so
no kept cast is ever stale, whoever wrote the weight and by whatever alias (`p.data`, numpy, a collective): tensor
versions do not tell. A kept scale that was written into is another scale: with it nothing kept is found.

    forever    kept while the weight is what it was
    step       likewise, and gone when the clock moves on over a whole step that did not ask for it

A place in the graphs (site and slot) has one cast at a time: that of a weight that changed goes when the new one comes,
which then lies where it lay. (Freed all at once at the end of a step, and their pages taken from the system again in
the next, casts of a GPT-2 cost 8 to 14 % of a training step.) Places that cast the same bytes alike (a tied head, FWD
and BWD) have one between them.

Nothing is kept where an engine gathers weights for a moment (ZeRO-3, FSDP, offloading), of tensors off the CPU or that
are no plain tensors, where operations are traced or seen by a dispatch mode, nor by a copy or in a pickle of the model.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from runtime.kernels.cpu.fingerprint import fingerprint
from runtime.quantize.qtensor import CastKey

Lifetime = Literal["step", "forever"]
LIFETIMES: tuple[Lifetime, ...] = get_args(Lifetime)

_Key = tuple[bytes, torch.Size, tuple[int, ...], torch.dtype, CastKey]
_Place = tuple[int, int]


@dataclass(eq=False)
class Kept:
    """One cast, made as far as it was asked for: `scale` is None too where the spec has none."""

    lifetime: str
    scale: Tensor | None = None
    grid: Tensor | None = None
    places: set[_Place] = field(default_factory=set)
    amax: Tensor | None = None
    """max |x| of what was cast, where its quantizer observes that."""
    scale_version: int = 0
    is_asked: bool = True
    """Whether anything asked for it since the clock last moved on."""

    def scale_or(self, make: Callable[[], Tensor | None]) -> Tensor | None:
        if self.scale is None:
            self.scale = _outside_inference_mode(make)
            self.scale_version = 0 if self.scale is None else self.scale._version
        return self.scale

    @property
    def is_edited(self) -> bool:
        """Whether someone wrote into the scale."""
        return self.scale is not None and self.scale._version != self.scale_version

    def grid_or(self, make: Callable[[], Tensor]) -> Tensor:
        if self.grid is None:
            self.grid = _outside_inference_mode(make)
        return self.grid

    def observed_or(self, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Grid and largest magnitude."""
        if self.grid is None or self.amax is None:
            self.grid, self.amax = _outside_inference_mode(make)
        return self.grid, self.amax

    @property
    def num_bytes(self) -> int:
        return sum(each.untyped_storage().nbytes() for each in (self.scale, self.grid) if each is not None)


class Constants:
    """The kept casts of one compiled model. Keeps nothing until `watch` has seen the model."""

    def __init__(self) -> None:
        self.why_none = "no forward of the model has run"
        """Why nothing is kept; empty where casts are."""
        self._kept: dict[_Key, Kept] = {}
        self._key_at: dict[_Place, _Key] = {}
        self._num_forwards = 0
        """Since the clock last moved on."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Constants, ()

    @property
    def num_casts(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._kept.values())

    def watch(self, model: nn.Module) -> None:
        """Look, before each forward of `model`, whether its weights lie on this rank between uses. The walk through a
        model takes longer than a small product: the first 16 forwards of a step look, and then every 16th. What is
        kept too long till then is memory, and never stale.
        """
        self._num_forwards += 1
        if self._num_forwards > _LOOKS and self._num_forwards % _LOOKS:
            return
        self.why_none = why_gathered(model)
        if self.why_none:
            self.clear()

    def find(self, x: Tensor, cast: CastKey, site: int, slot: int, lifetime: str) -> Kept | None:
        """What is kept of the cast of x at this place, made or yet to be made; None where it must not be kept."""
        mark = None if self.why_none or not _is_keepable(x) else fingerprint(x)
        if mark is None:
            return None
        key, place = (mark, x.shape, x.stride(), x.dtype, cast), (site, slot)
        before = self._key_at.get(place)
        if before is not None and before != key:
            self._leave(place, before)
        self._key_at[place] = key
        kept = self._kept.get(key)
        if kept is None or kept.is_edited:
            kept = self._kept[key] = Kept(lifetime, places=set() if kept is None else kept.places)
        kept.places.add(place)
        kept.is_asked = True
        return kept

    def find_by_scale(self, scale: Tensor, site: int, slot: int) -> Kept | None:
        """What `find` gave at this place, if `scale` is its scale: the quantize after a kept scale."""
        key = self._key_at.get((site, slot))
        kept = None if key is None else self._kept.get(key)
        return kept if kept is not None and kept.scale is scale and not kept.is_edited else None

    def end_step(self) -> None:
        """The clock moves on: forget the casts of lifetime `step` that nothing asked for since it last did."""
        self._num_forwards = 0
        for key, kept in list(self._kept.items()):
            if kept.lifetime == "step" and not kept.is_asked:
                for place in self._kept.pop(key).places:
                    self._key_at.pop(place, None)
            kept.is_asked = False

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._key_at.clear()

    def _leave(self, place: _Place, key: _Key) -> None:
        kept = self._kept[key]
        kept.places.discard(place)
        if not kept.places:
            del self._kept[key]


_LOOKS = 16


def why_gathered(model: nn.Module) -> str:
    """Why the weights of a model are whole on this rank only while they are used; empty where they stay."""
    distributed = sys.modules.get("torch.distributed.tensor")  # a model can hold a DTensor only if this is loaded
    for module in model.modules():
        if "_is_fsdp_managed_module" in vars(module):
            return "FSDP gathers the weights for each use"
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if hasattr(parameter, "ds_id"):
                return "ZeRO-3 gathers the weights for each use"
            if distributed is not None and isinstance(parameter, distributed.DTensor):
                return "the weights are DTensors"
            if parameter.is_meta:
                return "the weights are loaded for each use"
    return ""


def _is_keepable(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and x.numel() > 0
        and _get_current_dispatch_mode() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _outside_inference_mode(make: Callable[[], Any]) -> Any:
    """A tensor made in inference mode could not be saved for a later backward."""
    if not torch.is_inference_mode_enabled():
        return make()
    with torch.inference_mode(False):
        return make()
