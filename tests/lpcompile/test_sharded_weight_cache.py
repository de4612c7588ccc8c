"""Under ZeRO-3 and FSDP2, in two real processes, no cast of a weight is kept, and no more is gathered than without us.

Counted at each linear layer, forward and backward: the elements of weights that lie on the rank, its own shards and
what the engine gathered.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lpcompile import lpcompile, report
from runtime.collectives.process_group import set_group_timeouts
from runtime.ops import small
from tests.machine_facts import needs_kernels
from tests.multiprocess import run_ranks

_WIDTH, _DEPTH, _STEPS = 64, 4, 2
_NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'lpcompile[deepspeed]'"
)


class Blocks(nn.Module):
    """Residual blocks of two linear layers each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = [(nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, _WIDTH)) for _ in range(_DEPTH)]
        self.blocks = nn.ModuleList(nn.Sequential(up, nn.GELU(), down) for up, down in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("wrapper", ["fsdp2", pytest.param("zero3", marks=[pytest.mark.slow, _NEEDS_DEEPSPEED])])
def test_no_rank_holds_more_than_the_plain_model(wrapper: str) -> None:
    for found in run_ranks(train_both, 2, wrapper, timeout_s=250):
        plain, compiled = found[None], found["fp8-rowwise"]
        assert plain["peak"] < 0.7 * plain["whole"], "the engine does shard"
        assert compiled["peak"] == plain["peak"]
        assert compiled["kept"] == 0
        assert "gathers the weights for each use" in compiled["why"]
        assert compiled["loss"] != plain["loss"], "it runs low precision"
        assert abs(compiled["loss"] - plain["loss"]) < 0.1 * plain["loss"]


@needs_kernels
def test_under_ddp_each_rank_keeps_its_own_and_lets_them_go() -> None:
    for found in run_ranks(train_both, 2, "ddp", timeout_s=120):
        compiled = found["fp8-rowwise"]
        assert compiled["peak"] == compiled["whole"]
        assert compiled["kept"] == 2 * 2 * _DEPTH
        assert compiled["why"] == ""


def train_both(rank: int, world: int, wrapper: str) -> dict[str | None, dict[str, Any]]:
    return {policy: train(rank, wrapper, policy) for policy in (None, "fp8-rowwise")}


def train(rank: int, wrapper: str, policy: str | None) -> dict[str, Any]:
    """Two steps of two micro-batches: the last loss, the peak of whole weights, and what is kept."""
    small.LARGEST = 0  # of this process: casts of small layers are not kept
    model = Blocks()
    whole = sum(p.numel() for p in model.parameters())
    if policy is not None:
        lpcompile(model, policy)
    wrapped: Any = _wrap(wrapper, model)
    peak = 0

    def look(*_: Any) -> None:
        nonlocal peak
        peak = max(peak, sum(_present(p) for p in _weights(model)))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(look)
            module.register_full_backward_hook(look)
    optimizer = None if wrapper == "zero3" else torch.optim.SGD(wrapped.parameters(), lr=0.01)
    kept, why = 0, ""
    for step in range(_STEPS):
        for micro in range(2):
            x = torch.randn(8, _WIDTH, generator=torch.Generator().manual_seed(rank + 10 * micro + 100 * step))
            loss = wrapped(x.requires_grad_()).square().mean()
            if optimizer is None:
                wrapped.backward(loss)
                wrapped.step()
            else:
                loss.backward()
            if policy is not None:
                told = report(model)
                kept, why = max(kept, told.num_kept_casts), told.why_none_kept
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    if wrapper == "zero3":
        wrapped.destroy()
    return {"loss": loss.item(), "peak": peak, "whole": whole, "kept": kept, "why": why}


def _weights(model: nn.Module) -> list[Tensor]:
    """What the modules hold at this moment under the names of their parameters."""
    return [each for module in model.modules() for each in module._parameters.values() if each is not None]


def _present(weight: Tensor) -> int:
    """Elements that lie on this rank: of a DTensor its shard; of what an engine has freed, none."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight.data
    return local.untyped_storage().nbytes() // local.element_size() if local.numel() else 0


def _wrap(wrapper: str, model: nn.Module) -> Any:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp2":
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block)  # type: ignore[arg-type]
        return fully_shard(model)
    from runtime.collectives.attach.deepspeed import initialize

    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
        },
    }
    engine = initialize(model, torch.optim.SGD(model.parameters(), lr=0.01), config)
    set_group_timeouts(60)
    return engine
