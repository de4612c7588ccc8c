"""What one forward and backward of a compiled example gives, for tests that compare two of them bit by bit."""

import torch
from torch import Tensor, nn

from lpcompile.api import run_state
from lpcompile.frontends.export.forward import ExportedForward
from lpcompile.frontends.install import installed
from tests.models_for_tests import Example


def forward_backward(example: Example) -> dict[str, Tensor]:
    """The loss, the output and every gradient; `gemm_calls` counts the lp.gemm ops that ran forward."""
    torch.manual_seed(5)
    outputs = example.model(**example.batch)
    loss, logits = outputs["loss"], outputs["logits"]
    loss.backward()
    gradients = {f"grad {name}": p.grad for name, p in example.model.named_parameters() if p.grad is not None}
    state = run_state(example.model)
    calls = 0 if state is None else state.gemm_calls
    return {"loss": loss.detach(), "output": logits.detach(), "gemm_calls": torch.tensor(calls), **gradients}


def calls_by_graph(model: nn.Module) -> tuple[int, int]:
    """How many calls the exported graph of a model ran, and how many it did not stand for."""
    record = installed(model)
    assert isinstance(record, ExportedForward)
    return record.num_calls, record.num_unserved
