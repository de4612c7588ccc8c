"""Tensor parallelism: layers that parallelize_module shards run where nothing is cast, and are refused by name where
something is.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lpcompile import lpcompile
from lpcompile.errors import NotSupported
from tests.multiprocess import run_ranks


def _parallel(rank: int, world: int, policy: str, is_compiled_first: bool) -> Any:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.ones(4, 8)
    expected = model(x)
    if is_compiled_first:
        lpcompile(model, policy)
    parallelize_module(model, init_device_mesh("cpu", (world,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if not is_compiled_first:
        lpcompile(model, policy)
    try:
        return bool(torch.allclose(model(x), expected))
    except NotSupported as error:
        return str(error)


@pytest.mark.parametrize("is_compiled_first", [True, False])
def test_a_cast_product_of_shards_is_refused(is_compiled_first: bool) -> None:
    for said in run_ranks(_parallel, 2, "int8", is_compiled_first):
        assert said.startswith("0, lpcompile: tensor parallelism shards an operand")
        assert "Expected plain tensors when the layer runs" in said
        assert "Got DTensor and DTensor. Try fully_shard in the place of parallelize_module" in said


def test_where_nothing_is_cast_shards_are_torchs() -> None:
    assert run_ranks(_parallel, 2, "fp32-emulated", True) == [True, True]
