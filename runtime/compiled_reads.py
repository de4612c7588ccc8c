"""Compiled reads: numbers that compiled code asks for each time it is called, and not while it is compiled.

    read = Read(ask)       an attribute of something that torch.compile traces; the graph's input is ask(), a call each

torch.compile takes a DynamicInt for an input of the graph, and gives the graph int(it). A Read answers that by asking,
in eager code: where on the stack checkpoints and hooks are seen, before anything of the graph has run.
"""

from collections.abc import Callable
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch._guards import TracingContext
from torch.fx.experimental.sym_node import DynamicInt


class Read(DynamicInt):
    """A signed number of 64 bits that `ask` gives when compiled code is called."""

    ask: Callable[[], int]

    def __new__(cls, ask: Callable[[], int]) -> Self:
        from torch._dynamo.eval_frame import skip_code  # here: it is imported where something is traced

        read = super().__new__(cls, _EXAMPLE)
        read.ask = torch.compiler.disable(ask)  # it runs in the middle of compiled code, where Dynamo takes what runs
        skip_code(cls.__int__.__code__)
        return read

    def __int__(self) -> int:
        return _EXAMPLE if TracingContext.try_get() is not None else self.ask()


class Reads:
    """Reads by name, each an attribute, as torch.compile finds them. A copy or a pickle has none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Reads, ()

    def find_or_make(self, name: str, ask: Callable[[], int]) -> str:
        """The name of the attribute."""
        vars(self).setdefault(name, Read(ask))
        return name


def count_in_trace(*what: object) -> int:
    """How often `what` was counted in the graph that is being traced, before this time; 0 outside of one."""
    counts, count = _counts_of_trace(), num_in_trace(*what)
    counts[what] = count + 1
    return count


def num_in_trace(*what: object) -> int:
    """How often `what` was counted in the graph that is being traced."""
    return _counts_of_trace().get(what, 0)


def _counts_of_trace() -> dict[tuple[object, ...], int]:
    trace = TracingContext.try_get()
    return {} if trace is None else _TRACES.setdefault(trace, {})


_EXAMPLE = 0x5E3779B97F4A7C15
"""What a compiler sees: a number that needs 64 bits."""
_TRACES: WeakKeyDictionary[TracingContext, dict[tuple[object, ...], int]] = WeakKeyDictionary()
