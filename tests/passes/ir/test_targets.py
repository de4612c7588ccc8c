"""Targets: a function's name leads back to it, in torch's namespaces, ours and a user's."""

import math
import operator
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from passes.ir.gemm_nodes import _READERS
from passes.ir.targets import find_target, name_of
from runtime.ops import attention
from runtime.ops.contractions import linear_kn
from runtime.ops.dialect import OPS


class Double(torch.autograd.Function):
    """A function of a user's own."""


NAMES: dict[str, Any] = {
    "torch.nn.functional.gelu": F.gelu,
    "torch.nn.functional.max_pool2d": F.max_pool2d,
    "torch.nn.functional.cross_entropy": F.cross_entropy,
    "torch._C._nn.linear": torch._C._nn.linear,
    "torch.Tensor.view": torch.Tensor.view,
    "torch.Tensor.__getitem__": torch.Tensor.__getitem__,
    "torch._C._set_grad_enabled": torch._C._set_grad_enabled,
    "torch.matmul": torch.matmul,
    "torch.ops.aten.mm": torch.ops.aten.mm,
    "torch.ops.aten.relu.default": torch.ops.aten.relu.default,
    "operator.getitem": operator.getitem,
    "math.sqrt": math.sqrt,
    "builtins.getattr": getattr,
    "runtime.ops.contractions.linear_kn": linear_kn,
    "runtime.ops.attention.scaled_query": attention.scaled_query,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_leads_to_the_function_and_back(name: str) -> None:
    assert name_of(NAMES[name]) == name
    assert find_target(name) is NAMES[name]


def _id(target: Any) -> str:
    return str(getattr(target, "__name__", target))


@pytest.mark.parametrize("target", [*_READERS, *(op.run for op in OPS.values())], ids=_id)
def test_every_function_that_passes_know_has_a_name(target: Any) -> None:
    name = name_of(target)
    assert name is not None
    assert find_target(name) is target


def test_what_no_name_leads_back_to_has_none() -> None:
    @dataclass(frozen=True)
    class Local:
        function: Any

    def local() -> None: ...

    assert name_of(local) is None
    assert name_of(lambda: None) is None
    assert name_of(Local(torch.matmul)) is None
    assert name_of(Double) is None


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("torch.nn.functional.gelv", "torch.nn.functional.gelu"),
        ("torch.Tensor.veiw", "torch.Tensor.view"),
        ("tocrh.add", "torch.add"),
        ("torch..add", "torch.add"),
        ("a b", "a function of torch, torch.Tensor"),
        ("", "a function of torch"),
    ],
)
def test_a_wrong_name_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(LookupError, match=hint):
        find_target(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "builtins.print(os.name)",
            "builtins.exit(os.name)",
            "builtins.exit",
            "builtins.print",
            "builtins.__import__",
        ),
        *("this.s", "math.pi", "torch", "sys.argv", "os.system", "torch.load", "torch.hub.load", "torch.manual_seed"),
        *("operator.call", "operator.attrgetter", "torch.Tensor.__reduce_ex__", "torch.Tensor.__init_subclass__"),
        *("torch.ops.load_library", "torch.ops.aten", "torch.ops.aten.mm.__call__", "torch.nn.Linear", "torch.Size"),
        *("runtime.ops.traced.lru_cache", "runtime.errors.nearest_names", "torch.nn.functional.warnings"),
    ],
)
def test_what_is_not_in_the_table_is_refused_and_not_imported(name: str) -> None:
    before = set(sys.modules)
    with pytest.raises(LookupError):
        find_target(name)
    assert set(sys.modules) == before
