"""Analyses: what a graph, a cost or a theorem says, with nothing rewritten."""
