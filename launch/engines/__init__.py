"""Engines: what holds the replicas of a model together."""
