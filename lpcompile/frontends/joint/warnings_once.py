"""Warnings once: what keeps torch.compile from making one graph of transformers' models.

GPT-2's loss says through `logger.warning_once` which loss it is, and torch.compile breaks the graph at the call of a
logger unless its configuration names the method as one to leave out of graphs.
"""

import logging

import torch


def leave_warnings_once_out_of_graphs() -> None:
    """Tell torch.compile, for the whole process, to trace past `logging.Logger.warning_once`, which transformers adds;
    eager code still warns. Does nothing where transformers is not loaded.
    """
    warning_once = getattr(logging.Logger, "warning_once", None)
    if warning_once is not None:
        torch._dynamo.config.ignore_logging_functions.add(warning_once)
