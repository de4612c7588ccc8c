"""The trainer: one idea a file."""
