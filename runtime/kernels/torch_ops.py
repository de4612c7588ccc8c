"""Torch ops: each op of this package declared once, with all that a tracer, a dispatch mode and autograd ask of it.

    declare(schema, run, fake=...)      defines lp::NAME and adds its row to OPS

The schema says what an op writes, `Tensor(a!)`. `run` alone may read the memory of a tensor (kernels/cpu/address.py):
while it runs nothing can observe, so that kernels call one another there without a dispatcher, and autocast is off: it
would round what torch's own products give. Whatever may be observed, layers and public functions, calls
torch.ops.lp.NAME and nothing below it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.library import Library, register_autograd, register_fake

from runtime.kernels.flops import register_flops


@dataclass(frozen=True)
class TorchOp:
    """One row of OPS."""

    schema: str
    run: Callable[..., Any]
    """What it does, on every device; of a composite one in terms of other ops."""
    fake: Callable[..., Any] | None
    """Shapes, strides and dtypes of the results, for tensors without values; a composite op needs none."""
    backward: Callable[..., Any] | None = None
    flops: Callable[..., int] | None = None
    """Of one call, from the arguments with shapes in place of tensors; 2 for a multiply-add, as torch counts."""

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def is_watched() -> bool:
    """Whether something sees operations as they run: a dispatch mode, a tracer, the profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def has_transforms() -> bool:
    """Whether a transform of torch.func runs."""
    return bool(vars(torch._C)["_are_functorch_transforms_active"]())


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is under way."""
    return has_transforms() or forward_ad._current_level >= 0


OPS: dict[str, TorchOp] = {}
"""Every op whose file is imported, by name."""


def declare(
    schema: str,
    run: Callable[..., Any],
    *,
    fake: Callable[..., Any] | None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> None:
    """Define lp::NAME. Without a fake it is composite: tracers see what `run` calls."""
    op = TorchOp(schema, run, fake, backward, flops)
    OPS[op.name] = op
    _LIBRARY.define(schema)
    _LIBRARY.impl(
        op.name,
        run if fake is None else _without_autocast(run),
        "CompositeImplicitAutograd" if fake is None else "CompositeExplicitAutograd",
    )
    if fake is not None:
        register_fake(f"lp::{op.name}", fake, lib=_LIBRARY)
    if backward is not None:
        register_autograd(f"lp::{op.name}", backward, setup_context=setup_context, lib=_LIBRARY)
    if flops is not None:
        register_flops(op.name, flops)


def _without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return run(*args, **kwargs)
        with torch._C._DisableAutocast():
            return run(*args, **kwargs)

    return call


_LIBRARY = Library("lp", "FRAGMENT")
