"""Marks that torch.compile reads on functions. torch's own decorators import its compiler at once: 1.5 seconds."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_result(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does: the function runs while a graph is made, and what it gives is a
    constant of the graph.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
