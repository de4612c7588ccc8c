"""The IR: programs of graphs, their ops, their text, their verifier."""
