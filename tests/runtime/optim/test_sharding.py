"""Two real processes: FSDP2 shards and DDP replicas draw the bits of the whole, and end as one process does."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from runtime.optim.adamw import LowPrecisionAdamW
from runtime.optim.formats import UpdateFormats
from runtime.optim.places import Run, runs_of
from runtime.optim.sgd import LowPrecisionSGD
from tests.multiprocess import run_ranks

SHAPES = ((5, 3), (1, 7), (7,), (33, 65))
CASES = {
    "adamw-bf16": (LowPrecisionAdamW, torch.bfloat16, UpdateFormats("bf16", "bf16", "e5m2", "stochastic")),
    "adamw-split": (LowPrecisionAdamW, torch.bfloat16, UpdateFormats("bf16+16", "bf16", "fp32", "stochastic")),
    "adamw-master": (LowPrecisionAdamW, torch.bfloat16, UpdateFormats("dlfloat16", "bf16", "fp32", "stochastic")),
    "sgd-dlfloat": (LowPrecisionSGD, torch.float32, UpdateFormats("dlfloat16", "1-5-2", rounding="stochastic")),
}


def _values(step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def _train(case: str, place: Any) -> list[Any]:
    """Three steps from the same weights, with the same gradients, each of them where `place` puts it."""
    kind, dtype, formats = CASES[case]
    weights = [nn.Parameter(place(value)) for value in _values(0, dtype)]
    optimizer = kind(weights, lr=0.01, formats=formats, seed=9)
    for step in range(1, 4):
        for weight, gradient in zip(weights, _values(step, dtype)):
            weight.grad = place(gradient)
        optimizer.step()
    kept = [optimizer.state[weight][name] for weight in weights for name in sorted(optimizer.state[weight])]
    return [_plain(_whole(each.detach())) for each in (*weights, *kept)]


def _plain(tensor: Tensor) -> tuple[str, list[float]]:
    """A tensor as it travels between processes."""
    return str(tensor.dtype), tensor.double().flatten().tolist()


def _whole(tensor: Tensor) -> Tensor:
    """All of a DTensor: of every state, a split master's remainder too."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shards(rank: int, world: int) -> dict[tuple[str, int], list[Any]]:
    mesh = init_device_mesh("cpu", (world,))

    def placed(value: Tensor, dim: int) -> Tensor:
        return distribute_tensor(value, mesh, [Shard(min(dim, value.dim() - 1))])

    return {(case, dim): _train(case, partial(placed, dim=dim)) for case in CASES for dim in (0, 1)}


def test_shards_have_the_bits_of_the_whole() -> None:
    whole = {case: _train(case, lambda value: value.clone()) for case in CASES}
    for results in run_ranks(_shards, 2):
        assert len(results) == 2 * len(CASES)
        for (case, dim), ours in results.items():
            assert ours == whole[case], (case, dim)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _steps(model: nn.Module, formats: UpdateFormats) -> None:
    """The same batch on every rank, of powers of two: a mean of equal gradients is exact."""
    optimizer = LowPrecisionAdamW(model.parameters(), lr=0.01, formats=formats, seed=9)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


FSDP = UpdateFormats("bf16", "bf16", "bf16", "stochastic")


def _engines(rank: int, world: int) -> tuple[list[Any], list[Any]]:
    sharded, replica = _model(), _model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    _steps(sharded, FSDP)
    _steps(DistributedDataParallel(replica), FSDP)
    assert all(isinstance(each, DTensor) for each in sharded.parameters())
    return [_plain(_whole(each.detach())) for each in sharded.parameters()], list(map(_plain, replica.parameters()))


def test_fully_shard_and_ddp_end_as_one_process() -> None:
    alone = _model()
    _steps(alone, FSDP)
    expected = [each.detach() for each in alone.parameters()]
    assert all((each.view(torch.int32) & 0xFFFF == 0).all() for each in expected), "weights on the grid of bf16"
    for shards, replica in run_ranks(_engines, 2):
        assert shards == list(map(_plain, expected))
        assert replica == list(map(_plain, expected))


def _runs(rank: int, world: int) -> list[list[Run]]:
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.zeros(4, 3)
    dist.barrier()
    return [runs_of(distribute_tensor(whole, mesh, [Shard(dim)])) for dim in (0, 1)]


def test_where_elements_lie() -> None:
    first, second = run_ranks(_runs, 2)
    assert first == [[Run(0, 6, 0)], [Run(2 * i, 2, 3 * i) for i in range(4)]]
    assert second == [[Run(0, 6, 6)], [Run(i, 1, 3 * i + 2) for i in range(4)]]
    assert runs_of(torch.zeros(2, 3)) == [Run(0, 6, 0)]
