"""The roof: the distributed trainer and the command line."""

import os

PARENT = os.getppid()
"""Who started this process. Asked before the seconds that imports take, in which it may be gone (training/watch.py)."""
