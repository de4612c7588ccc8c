"""Activation and residual as a part of a GEMM against torch's operations after it: every output and gradient, bit for
bit.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.registry import choose
from runtime.kernels.request import GemmRequest
from runtime.numerics.specs import ROLES, LayerSpec
from runtime.ops.activations import ACTIVATIONS
from runtime.ops.layer import cast, run_gemm
from runtime.ops.plan import GemmPlan
from runtime.state import RunState
from tests.runtime.ops.test_layer import OPERATIONS, _layer

_TORCH = {
    "": lambda y: y,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu-tanh": lambda y: F.gelu(y, approximate="tanh"),
}
_NAMES = ("linear", "linear_kn", "conv1d", "conv2d")
_LAYERS = {"identity": None, "plain": "plain", "tensor": "tensor"}


def _operands(name: str, layer: LayerSpec, dtype: torch.dtype) -> tuple[Any, ...]:
    operation, x_shape, w_shape, b_shape, geometry = OPERATIONS[name]
    torch.manual_seed(0)
    x, w, b = (torch.randn(shape).to(dtype).requires_grad_() for shape in (x_shape, w_shape, b_shape))
    residual = torch.randn(operation(x, w, b).shape).to(dtype).requires_grad_()
    kind = "conv" if geometry else name
    methods = tuple(choose(GemmRequest(kind, role, layer.role(role))).kernel for role in ROLES)
    plan = GemmPlan(kind, layer, methods, 0, geometry)  # type: ignore[arg-type]
    casts = {
        "fwd_lhs": cast(x, layer.fwd.lhs, None, 0, 0),
        "fwd_rhs": cast(w, layer.fwd.rhs, None, 0, 1),
        "bwd_rhs": None,
        "grad_lhs": cast(x, layer.grad.rhs, None, 0, 3),
    }
    return x, w, b, residual, casts, plan


def _run(
    name: str, how: str | None, activation: str, has_residual: bool, fused: bool, dtype: torch.dtype
) -> list[Tensor]:
    layer = LayerSpec() if how is None else _layer(name, how)
    x, w, b, residual, casts, plan = _operands(name, layer, dtype)
    if fused:
        z = run_gemm(x, w, b, casts, RunState(), plan, residual if has_residual else None, activation)
    else:
        y = run_gemm(x, w, b, casts, RunState(), plan)
        z = _TORCH[activation](y + residual if has_residual else y)
    if not z.requires_grad:
        return [z]
    z.backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(3)).to(dtype))
    return [z.detach(), *(each.grad for each in (x, w, b, residual) if each.grad is not None)]


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
@pytest.mark.parametrize(("name", "how"), list(itertools.product(_NAMES, _LAYERS)))
def test_every_bit_is_that_of_separate_operations(name: str, how: str, activation: str, has_residual: bool) -> None:
    assert set(_TORCH) == {"", *ACTIVATIONS}
    for dtype in (torch.float32, torch.bfloat16):
        given = (name, _LAYERS[how], activation, has_residual)
        fused, apart = (_run(*given, fused=each, dtype=dtype) for each in (True, False))
        assert len(fused) == len(apart) == 4 + has_residual
        assert all(torch.equal(left, right) for left, right in zip(fused, apart))
        with torch.no_grad():
            (fused_z,), (apart_z,) = (_run(*given, fused=each, dtype=dtype) for each in (True, False))
        assert torch.equal(fused_z, apart_z)
        assert torch.equal(fused_z, fused[0])


def test_a_residual_that_is_no_matrix_in_memory_is_added_all_the_same() -> None:
    layer = _layer("linear", "tensor")
    x, w, b, residual, casts, plan = _operands("linear", layer, torch.float32)
    strided = residual.detach().transpose(0, 2).contiguous().transpose(0, 2)
    fused = run_gemm(x, w, b, casts, RunState(), plan, strided, "relu")
    assert torch.equal(fused, torch.relu(run_gemm(x, w, b, casts, RunState(), plan) + strided))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_are_torchs(activation: str) -> None:
    x = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [-0.0], [0.0], [-1.0]])
    w, plan = torch.ones(1, 1), GemmPlan("linear", LayerSpec(), ("as_is",) * 3, 0)
    spec = LayerSpec()
    casts = {key: cast(value, spec.fwd.lhs, None, 0, 0) for key, value in (("fwd_lhs", x), ("fwd_rhs", w))}
    got = run_gemm(x, w, None, {**casts, "bwd_rhs": None, "grad_lhs": None}, RunState(), plan, None, activation)
    torch.testing.assert_close(got, _TORCH[activation](F.linear(x, w)), rtol=0, atol=0, equal_nan=True)


def test_gradients_of_a_residual_that_is_the_input_too_add_up_in_the_order_of_separate_operations() -> None:
    """x gets three: of a later use, of the sum, of the product; fp32 sums depend on the order."""
    layer = LayerSpec()
    torch.manual_seed(0)
    leaf, w = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    dy, plan = torch.randn(64, 64), GemmPlan("linear", layer, ("as_is",) * 3, 0)
    found = []
    for is_fused in (True, False):
        leaf.grad = w.grad = None
        x = leaf * 1
        casts = {key: cast(x, layer.fwd.lhs, None, 0, 0) for key in ("fwd_lhs", "grad_lhs")}
        casts["fwd_rhs"] = cast(w, layer.fwd.rhs, None, 0, 1)
        given = (x, w, None, {**casts, "bwd_rhs": None}, RunState(), plan)
        y = run_gemm(*given, x, "relu") if is_fused else torch.relu(x + run_gemm(*given))
        (y + 0.1 * x).backward(dy)
        found.append((y.detach(), leaf.grad, w.grad))
    assert all(torch.equal(left, right) for left, right in zip(*found))  # type: ignore[arg-type]
