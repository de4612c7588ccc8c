"""Llama under DDP, FSDP2 and ZeRO-3 in two real processes: compiled before it is wrapped.

Under the identity policy the wrapped compiled model trains as the wrapped original, bit for bit; under int8 it runs
low precision on every rank, and ranks agree.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lpcompile import lpcompile
from lpcompile.api import run_state
from lpcompile.frontends.joint.compile_joint import compile_joint, joint_report
from runtime.collectives.process_group import set_group_timeouts
from tests.multiprocess import run_ranks
from tests.zoo.models import ZOO, Batch, build, loss_of

_STEPS = 3
_POLICIES = (None, "fp32-emulated", "int8")
_NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'lpcompile[deepspeed]'"
)
WRAPPERS = [
    "ddp",
    pytest.param("fsdp2", marks=pytest.mark.slow),
    pytest.param("zero3", marks=[pytest.mark.slow, _NEEDS_DEEPSPEED]),
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_training(wrapper: str) -> None:
    ranks = run_ranks(train_all, 2, wrapper, timeout_s=250)
    plain, identity, int8 = (ranks[0][policy] for policy in _POLICIES)
    assert identity["losses"] == plain["losses"]
    assert identity["calls"] == 19 * _STEPS
    assert int8["calls"] == 15 * _STEPS
    assert int8["losses"] != plain["losses"]
    assert all(abs(a - b) < 0.05 for a, b in zip(int8["losses"], plain["losses"]))
    assert plain["losses"][-1] < plain["losses"][0]
    assert [found["calls"] for found in ranks[1].values()] == [found["calls"] for found in ranks[0].values()]


def train_all(rank: int, world: int, wrapper: str) -> dict[str | None, dict[str, Any]]:
    return {policy: train(rank, world, wrapper, policy) for policy in _POLICIES}


def train(rank: int, world: int, wrapper: str, policy: str | None) -> dict[str, Any]:
    """The losses of some SGD steps on the same batch on both ranks, and how many compiled GEMMs ran."""
    model, batch = build("llama").train(), ZOO["llama"].batch(rank)
    if policy is not None:
        lpcompile(model, policy, example_kwargs=ZOO["llama"].batch(rank), strict=policy != "int8")
    wrapped: Any = _wrap(wrapper, model)
    optimizer = None if wrapper == "zero3" else torch.optim.SGD(wrapped.parameters(), lr=0.5)
    before = 0 if policy is None else run_state(model).gemm_calls
    losses = _sgd(wrapped, optimizer, batch)
    calls = 0 if policy is None else run_state(model).gemm_calls - before
    if wrapper == "zero3":
        wrapped.destroy()
    return {"losses": losses, "calls": calls}


def _sgd(wrapped: Any, optimizer: torch.optim.Optimizer | None, batch: Batch) -> list[float]:
    """The mean of the ranks' losses after each step; without an optimizer `wrapped` is an engine that has its own."""
    losses = []
    for _ in range(_STEPS):
        loss = loss_of(wrapped(**batch))
        if optimizer is None:
            wrapped.backward(loss)
            wrapped.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    return losses


def _wrap(wrapper: str, model: nn.Module) -> Any:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    from runtime.collectives.attach.deepspeed import initialize

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3},
    }
    engine = initialize(model, torch.optim.SGD(model.parameters(), lr=0.5), config)
    set_group_timeouts(60)
    return engine


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ddp of joint", "joint of ddp", "fsdp2, then joint", "joint, then fsdp2"])
def test_the_joint_front_end_trains_as_the_leaf_path_does(order: str) -> None:
    """Run op by op both ways, on two ranks: the same losses, bit for bit, and every named GEMM lowered."""
    wrapper = "ddp" if "ddp" in order else "fsdp2"
    expected = run_ranks(train, 2, wrapper, "hfp8", timeout_s=250)
    for rank, found in enumerate(run_ranks(train_joint, 2, order, timeout_s=250)):
        assert found["losses"] == expected[rank]["losses"]
        assert found["running"] == found["named"] == 45  # three roles of 2 x 7 layers and the head


def train_joint(rank: int, world: int, order: str) -> dict[str, Any]:
    model, batch = build("llama").train(), ZOO["llama"].batch(rank)
    stamped: nn.Module = model
    if order == "ddp of joint":
        run: Any = DistributedDataParallel(compile_joint(model, "hfp8", backend="aot_eager"))
    elif order == "joint of ddp":
        stamped = DistributedDataParallel(model)
        run = compile_joint(stamped, "hfp8", backend="aot_eager")
    elif order == "fsdp2, then joint":
        run = compile_joint(_wrap("fsdp2", model), "hfp8", backend="aot_eager")
    else:
        run = compile_joint(model, "hfp8", backend="aot_eager")
        _wrap("fsdp2", model)
    losses = _sgd(run, torch.optim.SGD(model.parameters(), lr=0.5), batch)
    gemms = joint_report(stamped).gemms
    return {"losses": losses, "named": len(gemms), "running": sum(row.runs_as_policy_says for row in gemms)}
