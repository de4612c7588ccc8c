"""Capture: from live modules to graphs and back."""
