"""The wire: compressed collectives, their ledger, and what attaches them to an engine."""

from runtime.collectives.exchange import all_reduce, reduce_scatter

__all__ = ["all_reduce", "reduce_scatter"]
