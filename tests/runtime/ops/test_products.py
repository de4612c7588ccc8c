"""Products as torch ops: what FLOP counters, selective checkpointing and tracers see of a compiled model."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from lpcompile import lpcompile

EMULATED = """
version: 1
name: emulated
source: a test
rules:
  - match: {name: "*"}
    fwd:  {x: e4m3, w: e4m3, accumulate: {format: 1-6-9, chunk: 8}}
    bwd:  {dy: e5m2, w: e4m3, accumulate: {format: 1-6-9, chunk: 8}}
    grad: {dy: e5m2, x: e4m3, accumulate: {format: 1-6-9, chunk: 8}}
"""
PRODUCTS = [getattr(torch.ops.lp, role).default for role in ("fwd", "bwd", "grad")]


def _policy(name: str, tmp_path: Path) -> Any:
    if name != "emulated":
        return name
    (tmp_path / "emulated.yaml").write_text(EMULATED)
    return tmp_path / "emulated.yaml"


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.first, self.second = nn.Linear(4 * 64, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.conv(x))))
        y: Tensor = self.second(torch.relu(self.first(x.flatten(1))))
        return y


def _flops(model: nn.Module, x: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        model(x).square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("policy", ["hfp8", "fp8-rowwise", "int8", "bf16", "emulated"])
def test_every_flop_is_counted(policy: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    wanted = _flops(_Net(), x)
    assert _flops(lpcompile(_Net(), _policy(policy, tmp_path)), x) == wanted


def _gradients(model: nn.Module, x: Tensor, context: Any = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    if context is None:
        y = model(x)
    else:
        y = checkpoint(model, x, use_reentrant=False, context_fn=context)
    y.square().sum().backward()
    parameters = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [each for each in (y.detach(), x.grad, *parameters) if each is not None]


@pytest.mark.parametrize("saved", ["products", "everything"])
@pytest.mark.parametrize("policy", ["hfp8", "fp8-rowwise", "int8", "bf16", "emulated"])
def test_selective_checkpointing_changes_no_gradient(policy: str, saved: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = lpcompile(_Net(), _policy(policy, tmp_path)), torch.randn(2, 3, 4, 4)
    wanted = _gradients(model, x)

    def save(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        is_saved = op in PRODUCTS or (saved == "everything" and op.namespace == "lp")
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    found = _gradients(model, x, partial(create_selective_checkpoint_contexts, save))
    assert len(found) == len(wanted) == 10
    for one, other in zip(found, wanted):
        assert torch.equal(one, other)
