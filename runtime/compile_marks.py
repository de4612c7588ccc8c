"""Marks that torch.compile reads on functions. torch's own decorators import its compiler at once: 1.5 seconds."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_result(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does: the function runs while a graph is made, and what it gives is a
    constant of the graph.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compiler.disable does for code that only a graph being traced calls: the graph breaks, and the
    function and all that it calls run in eager code.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        from torch._dynamo import disable

        return disable(function)(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return run
