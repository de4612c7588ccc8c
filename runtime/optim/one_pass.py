"""One pass: an update by update.cpp, where that serves, instead of torch's operations; the bits are the same.

It reads and writes every number once, on all threads. What it does not serve: masters that are states of their own,
COAT's moments, blocks of shards, other devices, parameters that are not contiguous, formats and dtypes that
runtime/kernels/cpu/update.py does not list, and AdamW on a machine where torch's operations are found to round
otherwise (no fused multiply-add).
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from runtime.kernels.cpu import update
from runtime.kernels.cpu.update import Numbers, Values
from runtime.optim.block_names import TABLES, block_state_of
from runtime.optim.block_states import table_of
from runtime.optim.formats import of_pairs, storage_of
from runtime.optim.places import local
from runtime.optim.rounding import KEY

if TYPE_CHECKING:
    from runtime.optim.optimizer import Weight

Slots = tuple[int, int, int]


def adamw_in_one_pass(weight: "Weight", slots: Slots) -> bool:
    """Whether the step was made."""
    kept = _kept(weight, ("exp_avg", "exp_avg_sq"), slots)
    if kept is None or not _adds_as_torch():
        return False
    group, step = weight.group, weight.step
    numbers = adamw_numbers(group["lr"], group["betas"], group["eps"], group["weight_decay"], group["loss_scale"], step)
    gradient, (moment, variance, master) = _gradient(weight), kept
    for begin, size, offset in weight.runs:
        w, m, v = (_part(each, begin, size) for each in (master, moment, variance))
        update.adamw(numbers, w, m, v, gradient[begin : begin + size], weight.group["seed"] ^ KEY, step, offset)
    _mark_written(weight, master, moment, variance)
    return True


def sgd_in_one_pass(weight: "Weight", slots: Slots) -> bool:
    """Whether the step was made."""
    group = weight.group
    kept = _kept(weight, ("momentum_buffer",), slots[1:])
    if kept is None:
        return False
    numbers = Numbers(
        unscale=1 / group["loss_scale"], decay=group["weight_decay"], beta=group["momentum"], rest=-group["lr"]
    )
    gradient, (moment, master) = _gradient(weight), kept
    rounding = Values(None, moment.format, moment.rounding, weight.stream(slots[0]))
    for begin, size, offset in weight.runs:
        parts = (_part(master, begin, size), _part(moment, begin, size), rounding)
        update.sgd(numbers, *parts, gradient[begin : begin + size], group["seed"] ^ KEY, weight.step, offset)
    _mark_written(weight, master, moment)
    return True


def adamw_numbers(
    lr: float, betas: tuple[float, float], eps: float, decay: float, loss_scale: float, step: int
) -> Numbers:
    """What runtime/optim/adamw.py multiplies by at a step."""
    beta1, beta2 = betas
    return Numbers(
        unscale=1 / loss_scale, decay=1 - lr * decay, beta=beta1, rest=1 - beta1, beta2=beta2, rest2=1 - beta2,
        root=(1 - beta2**step) ** 0.5, eps=eps, size=-(lr / (1 - beta1**step)),
    )  # fmt: skip


def _kept(weight: "Weight", moments: tuple[str, ...], slots: tuple[int, ...]) -> list[Values] | None:
    """The moments and the master; None if one of them is not served."""
    parameter = local(weight.parameter.detach())
    gradient = weight.parameter.grad
    assert gradient is not None
    is_whole = weight.is_own_master and parameter.is_contiguous() and parameter.is_cpu
    if not is_whole or gradient.dtype not in (torch.float32, torch.bfloat16) or update.update_library() is None:
        return None
    formats, rounding = weight.formats, weight.formats.rounding
    kept = []
    for name, slot in zip(moments, slots):
        held = _flat(weight.state[name]) if name in weight.state else None
        format = formats.variance if name == "exp_avg_sq" else formats.momentum
        if held is not None and not block_state_of(format) and storage_of(format).is_paired:
            held = of_pairs(held)
        moment = Values(held, format, rounding, weight.stream(slot))
        if state := block_state_of(format):
            if state.is_expanded or isinstance(weight.parameter, DTensor):
                return None
            table = table_of(state.element, is_signed=name != "exp_avg_sq") if state.element in TABLES else None
            scales = weight.state[f"{name}_scale"]
            moment = moment._replace(format=state.element, scales=scales, block=state.block, table=table)
        kept.append(moment)
    low = of_pairs(_flat(weight.state["remainder"])) if "remainder" in weight.state else None
    kept.append(Values(parameter.view(-1), formats.master, rounding, weight.stream(slots[-1]), low))
    return kept if all(map(update.is_served, kept)) else None


def _gradient(weight: "Weight") -> Tensor:
    assert weight.parameter.grad is not None
    return local(weight.parameter.grad).reshape(-1)


def _flat(state: Tensor) -> Tensor:
    return local(state).view(-1)


def _part(values: Values, begin: int, size: int) -> Values:
    if values.scales is not None:  # of a whole parameter, which is one run
        return values
    kept, low = (None if each is None else each[begin : begin + size] for each in (values.kept, values.low))
    return values._replace(kept=kept, low=low)


def _mark_written(weight: "Weight", *written: Values) -> None:
    """Autograd, and the casts that are kept by it, see that the tensors have changed."""
    held = [each for values in written for each in (values.kept, values.low, values.scales) if each is not None]
    torch.autograd.graph.increment_version([weight.parameter, *held])


@lru_cache(maxsize=1)
def _adds_as_torch() -> bool:
    """Whether AdamW by update.cpp has the bits of torch's operations on this machine, on either side of beta1 = 1/2."""
    generator = torch.Generator().manual_seed(0)
    for betas in ((0.9, 0.99), (0.3, 0.6)):
        w, m, g = (torch.randn(1027, generator=generator) for _ in range(3))
        v = m.square() + 0.1
        numbers, mine = adamw_numbers(1e-2, betas, 1e-8, 0.1, 1.0, 3), [each.clone() for each in (w, m, v)]
        given = [Values(each, "fp32") for each in mine]
        update.adamw(numbers, given[0], given[1], given[2], g, 0, 3, 0)
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        denominator = (v.double().sqrt().float() / (1 - betas[1] ** 3) ** 0.5).add_(1e-8)
        w.mul_(1 - 1e-2 * 0.1).addcdiv_(m, denominator, value=-(1e-2 / (1 - betas[0] ** 3)))
        if not all(map(torch.equal, mine, (w, m, v))):
            return False
    return True
