"""Fake: what is known of tensors while a graph is traced, and how to compute beside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes


def has_values(x: Tensor) -> bool:
    """Whether the elements of x may be looked at: not of a fake tensor, nor on `meta`, nor while make_fx traces."""
    return not isinstance(x, FakeTensor) and not x.is_meta and get_proxy_mode() is None


@contextmanager
def beside_tracing() -> Iterator[None]:
    """Tensor code inside is run for its values, and leaves no trace in a graph that is being made."""
    with _disable_current_modes(), torch.inference_mode(False):
        yield
