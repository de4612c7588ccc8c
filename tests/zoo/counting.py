"""Counting: which functions multiply matrices in a forward, and which of them do so outside the compiled sites."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import runtime.ops.product

_PRODUCTS = frozenset(
    {
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.bilinear,
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        F.grouped_mm,
        torch._grouped_mm,
        torch.addmm,
        torch.Tensor.addmm,
        torch.baddbmm,
        torch.Tensor.baddbmm,
        torch.einsum,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.bmm,
        torch.Tensor.bmm,
        torch.mm,
        torch.Tensor.mm,
        torch.lstm,
        torch.gru,
        torch._transformer_encoder_layer_fwd,
        torch._native_multi_head_attention,
    }
)


class _Count(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.is_inside = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and not self.is_inside and not _is_without_data(args):
            self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_products(model: nn.Module, batch: Mapping[str, Any], aside: Sequence[nn.Module] = ()) -> Counter[str]:
    """Calls of functions that multiply matrices in one forward, by name, without those inside a compiled GEMM or one of
    the modules `aside`.
    """
    mode = _Count()

    def enter(*_: Any) -> None:
        mode.is_inside = True

    def leave(*_: Any) -> None:
        mode.is_inside = False

    hooks = [module.register_forward_pre_hook(enter) for module in aside]
    hooks += [module.register_forward_hook(leave) for module in aside]
    with _compiled_gemms_aside(mode), mode:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return mode.calls


def _is_without_data(args: Sequence[Any]) -> bool:
    """Whether only the shape of a product is asked for."""
    return any(isinstance(each, Tensor) and each.is_meta for each in args)


@contextmanager
def _compiled_gemms_aside(mode: _Count) -> Iterator[None]:
    names = ("run_gemm", "multiply_unrecorded")
    originals = {name: getattr(runtime.ops.product, name) for name in names}

    def aside(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            mode.is_inside = True
            try:
                return original(*args, **kwargs)
            finally:
                mode.is_inside = False

        return run

    for name, original in originals.items():
        setattr(runtime.ops.product, name, aside(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(runtime.ops.product, name, original)
