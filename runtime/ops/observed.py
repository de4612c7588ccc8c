"""Observed operands: the casts of a site whose scale follows from what was cast in the steps before.

    lp::cast_observed    grid and scale of x by the quantizer `owner` of the state with this key, which looks at x

In eager code a cast of an activation is shared, and one of a weight kept, as casts without state are: q, k and v whose
scales are equal cast x once, and each quantizer is told what it would have seen. A forward is looked at once, where it
is differentiated; evaluation and what a checkpoint runs again are not. A recomputed call has the scale of its forward.

Compiled code holds these casts as opaque ops, since they read and write a state: no input of the graph is part of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.cast.grid import roomy_dtype
from runtime.kernels.cast.observed import to_grid_observed
from runtime.kernels.fake import has_values
from runtime.kernels.torch_ops import declare
from runtime.numerics.specs import QuantSpec
from runtime.ops.draws import draw_of
from runtime.quantize.cast_memo import MEMO
from runtime.quantize.kept_casts import Kept
from runtime.quantize.observed.quantizer import Observed
from runtime.quantize.qtensor import CastKey, QTensor
from runtime.quantize.quantizer import NO_DRAW, Draw
from runtime.quantize.storage import storage_dtype
from runtime.recomputation import is_learning, remembered
from runtime.state import RunState, find_state
from runtime.streams import Turn

Find = Callable[[CastKey], Kept | None]
"""What is kept of a cast with this key."""


def cast_forward(x: Tensor, state: RunState, owner: str, draw: Draw = NO_DRAW, find: Find | None = None) -> QTensor:
    """A cast in a forward. find: of a weight, what is kept of it."""
    quantizer: Observed = state.quantizers[owner]
    if not quantizer.training:
        return cast_observed(x, quantizer, quantizer.scale(x), draw, find, looks=False)[0]
    scale = remembered((state.key, owner), lambda: quantizer.scale(x))
    return cast_observed(x, quantizer, scale, draw, find, looks=is_learning())[0]


def cast_backward(x: Tensor, state: RunState, owner: str, draw: Draw = NO_DRAW) -> tuple[QTensor, Tensor]:
    """A cast that backward makes and no forward did, of a gradient, or of a weight that BWD casts in its own way; and
    max |x|, fp32 ().
    """
    quantizer: Observed = state.quantizers[owner]
    return cast_observed(x, quantizer, quantizer.scale(x), draw, None, looks=quantizer.training, is_shared=False)


def cast_again(x: Tensor, state: RunState, owner: str, draw: Draw = NO_DRAW, find: Find | None = None) -> QTensor:
    """A cast of a weight that FWD made too."""
    quantizer: Observed = state.quantizers[owner]
    return cast_observed(x, quantizer, quantizer.scale(x), draw, find, looks=False)[0]


def cast_observed(
    x: Tensor, quantizer: Observed, scale: Tensor, draw: Draw, find: Find | None, *, looks: bool, is_shared: bool = True
) -> tuple[QTensor, Tensor]:
    """x / scale on the grid, and max |x|; `looks`: whether the quantizer is told of x."""
    spec, key = quantizer.spec, quantizer.keyed(scale)

    def make() -> tuple[Tensor, Tensor]:
        seed, step, stream, _ = draw
        return to_grid_observed(x, spec, scale, storage_dtype(spec.format), seed=seed, step=step, stream=stream)

    kept = find(key) if find is not None and not key.is_drawn else None
    if kept is not None:
        grid, amax = kept.observed_or(make)
    elif find is not None or not is_shared or key.is_drawn or not scale.is_cpu:
        grid, amax = make()
    else:
        grid, amax = MEMO.find_or_make(x, key, make)
    if looks and has_values(amax):
        quantizer.note(x, amax)
    return QTensor(grid, scale, *key), amax


def _cast_observed(
    x: Tensor, spec: str, clock: Sequence[int], key: int, site: int, slot: int, owner: str, looks: bool
) -> tuple[Tensor, Tensor]:
    state, parsed = find_state(key), QuantSpec.parse(spec)
    assert state is not None
    quantizer: Observed = state.quantizers[owner]
    draw = draw_of(parsed, Turn(tuple(clock), site), site, slot)
    looks = looks and quantizer.training
    made, _ = cast_observed(x, quantizer, quantizer.scale(x), draw, None, looks=looks, is_shared=False)
    assert made.scale is not None
    return made.grid.to(roomy_dtype(parsed, storage_dtype(parsed.format))), made.scale.clone()


def cast_observed_shape(x: Tensor, spec: str, *_: Any) -> tuple[Tensor, Tensor]:
    """Of tensors without values."""
    parsed = QuantSpec.parse(spec)
    grid = torch.empty(x.shape, dtype=roomy_dtype(parsed, storage_dtype(parsed.format)), device=x.device)
    return grid, x.new_empty((), dtype=torch.float32)


declare(
    "cast_observed(Tensor x, str spec, SymInt[] clock, int key, int site, int slot, str owner, bool looks) "
    "-> (Tensor, Tensor)",
    _cast_observed,
    fake=cast_observed_shape,
)
