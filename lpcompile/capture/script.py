"""Script: what one call of a forward did with its sizes, for the calls of equal modules after it to be compared with.

    layers.0 runs on shadows (shapes.py) and writes the script:   linear(x: s0 s1 64) -> s0 s1 32,  relu(...) -> ...
    layers.1 runs, and each of its operations is looked up:       same function, same shadows, same values: same sizes

Running an operation on shadows costs a hundred times what comparing it does, and the blocks of a deep model do alike.
Nothing is assumed of a module because it looks like another: its forward runs and every operation is compared, so what
it read from a global, a counter or its own index shows as another operation or another condition. From there on the
call runs on shadows itself, and no later call follows that script. A call that makes fewer conditions than the script
keeps the script's: its guard is then narrower than need be, and never wrong.
"""

from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

Size = int | torch.SymInt


@dataclass(frozen=True)
class Step:
    """One operation: its arguments with shadows for tensors, and the shadows it gave; None if its sizes are fixed."""

    function: Any
    arguments: Any
    outputs: tuple["Look", ...]
    shadows: tuple[Tensor, ...] | None


Look = tuple[tuple[int, ...], torch.dtype, torch.device]
"""What is compared of an output: its real sizes, dtype, device."""


class Script:
    """The symbols of a call, and its operations so far. Shared by the calls that follow it."""

    def __init__(self) -> None:
        self.env = ShapeEnv(duck_shape=False, allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # an entry of its cache with symbols costs as much as the operation
        self.symbols: dict[sympy.Symbol, tuple[int, int | None]] = {}
        """Symbol -> (argument leaf, dim); dim None: the leaf is itself a size."""
        self.leaves: dict[int, tuple[Size, ...]] = {}
        self.shadows: dict[int, Tensor] = {}
        """Of the tensors among the arguments, by leaf."""
        self.steps: list[Step] = []
        self.outside: dict[int, tuple[Tensor, Any]] = {}
        """Shadows of tensors that are no arguments (parameters), by id, with what `look_outside` said of the tensor."""
        self.told: dict[Any, tuple[Any, dict[sympy.Basic, Any]]] = {}
        """Per caller's script and sizes: the state whose conditions it knows, and what sizes are called there."""
        self.facts: tuple[Any, Any] | None = None
        """(state, facts) as last asked for."""
        self.is_good = True
        """False: no further call may follow it."""

    @property
    def state(self) -> tuple[int, int]:
        """Grows with each condition on the sizes."""
        return len(self.env.guards), len(self.env.replacements)


def look(tensor: Tensor) -> Look:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def look_outside(tensor: Tensor) -> Any:
    """What the shadow of a parameter is made from."""
    return (*look(tensor), tensor.layout, tensor.stride() if tensor.layout is torch.strided else None)
