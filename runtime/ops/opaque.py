"""Opaque: how a GEMM that is being compiled calls the ops that runtime/ops/traced.py defines."""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.numerics.random import signed_seed
from runtime.numerics.specs import Role
from runtime.state import RunState

Attributes = tuple[str, str, str, int, str]
"""Those of an lp.gemm node: kind, spec, methods, site, geometry."""


def multiply(
    role: Role, attributes: Attributes, a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None],
    rest: Tensor | Sequence[int] | None, dtype: torch.dtype, state: RunState | None,
) -> Tensor:  # fmt: skip
    """The product of two operands, each grid and scale, in one role. rest: FWD's bias, else the shape of the result."""
    op = {"fwd": torch.ops.lp.fwd, "bwd": torch.ops.lp.bwd, "grad": torch.ops.lp.grad}[role]
    result: Tensor = op(*a, *b, rest, *attributes, clock_of(state, attributes[1]), dtype)
    return result


def cast_watched(dy: Tensor, spec: str, state: RunState, site: int, slot: int) -> tuple[Tensor, Tensor]:
    """Grid and scale (1 if it has none) of a gradient whose overflow `state` watches."""
    grid, scale = torch.ops.lp.cast_gradient(dy, spec, clock_of(state, spec), state.key, site, slot)
    return grid, scale


def clock_of(state: RunState | None, spec: str) -> tuple[int, int, int, int]:
    """(seed, rank, step, micro-batch) where something is stochastic, else zeros: what is read becomes a guard."""
    if state is None or "stochastic" not in spec:
        return (0, 0, 0, 0)
    return (signed_seed(state.seed), state.rank, state.step, state.micro_batch)
