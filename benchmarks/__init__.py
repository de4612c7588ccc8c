"""Benchmarks: each module is one command, `python -m benchmarks.NAME`, and prints ratios measured in one run."""
