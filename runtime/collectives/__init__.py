"""The wire: compressed collectives, their ledger, and what attaches them to an engine."""
