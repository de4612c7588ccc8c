"""The wire: compressed collectives, their ledger, and what attaches them to an engine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.collectives.exchange import all_reduce, reduce_scatter

__all__ = ["all_reduce", "reduce_scatter"]


def __getattr__(name: str) -> Any:
    """Looked up when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from runtime.collectives import exchange

    globals()[name] = getattr(exchange, name)
    return globals()[name]
