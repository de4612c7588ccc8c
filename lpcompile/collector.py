"""Python's garbage collector while a model is compiled: of young objects only.

Compiling builds hundreds of thousands of graph nodes and drops next to none of them. A full collection looks through
all of them, and through the model, again and again, which made the cost of a layer grow with depth; what does become
garbage is young.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEVER = 1 << 30


@contextmanager
def no_full_collections() -> Iterator[None]:
    """No collection of the oldest generation inside; the thresholds of before hold again after, also on an error."""
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)
