"""The end of a step: what quantizers have seen in it becomes part of their state, the same on all ranks.

One all-reduce with the maximum for all quantizers of a model together, whatever each rank has reached of it; those
that the policy calls per rank are left out of it.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import ScaleError, ScaleWarning
from runtime.quantize.observed.quantizer import NOTHING, Observed


def observed_in(quantizers: Mapping[str, Any]) -> list[Observed]:
    """Those of a model that observe, in the order of its operands, which is that of every rank."""
    return [each for each in quantizers.values() if isinstance(each, Observed)]


def end_step(quantizers: Mapping[str, Any], strict: bool, group: dist.ProcessGroup | None = None) -> None:
    """To be called by all ranks of `group` together, None: of all. A scale that reaches the end of its range is a
    ScaleWarning, under strict a ScaleError.
    """
    observed = observed_in(quantizers)
    if not observed:
        return
    told = []
    for quantizer, amax in zip(observed, _agreed(observed, group)):
        if amax != NOTHING and (sentence := quantizer.end_step(amax)):
            told.append(f"{_named(quantizer.owner)}: {sentence}")
    if told:
        sentence = f"a GradScale diverges: {'; '.join(told)}. Try a smaller learning rate, or a format of a wider range"
        if strict:
            raise ScaleError(sentence)
        warnings.warn(sentence, ScaleWarning, stacklevel=3)


def drop_seen(quantizers: Mapping[str, Any]) -> None:
    """The step is skipped: what was seen in it says nothing."""
    for each in observed_in(quantizers):
        each.drop_seen()


def _agreed(observed: Sequence[Observed], group: dist.ProcessGroup | None) -> list[float]:
    """What each has seen, NOTHING where it was not reached: on any rank, or of those per rank on this one."""
    seen = [each.take_seen() for each in observed]
    shared = [number for number, each in enumerate(observed) if not each.rule.per_rank]
    is_parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
    if not is_parallel or not shared:
        return _numbers(seen)
    device = observed[0].in_force.device
    reduced = torch.stack([torch.as_tensor(seen[number], dtype=torch.float32).to(device) for number in shared])
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=group)
    for number, value in zip(shared, reduced.tolist()):
        seen[number] = value
    return _numbers(seen)


def _numbers(seen: Sequence[float | Tensor]) -> list[float]:
    """As numbers; of those on a device all at once."""
    held = [each for each in seen if isinstance(each, Tensor)]
    numbers = iter(torch.stack(held).tolist() if held else ())
    return [next(numbers) if isinstance(each, Tensor) else each for each in seen]


def _named(owner: str) -> str:
    """The layer and role of a quantizer's name."""
    site, _, operand = owner.rpartition(".")
    roles = {"x": "fwd", "w": "fwd", "dy": "bwd", "x_grad": "grad", "w_bwd": "bwd", "dy_grad": "grad"}
    return f"{site or '(root)'} {roles[operand]}"
