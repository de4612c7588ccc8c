"""What runs on a device that is not the CPU, without one: meta tensors show every tensor the oracle would make on the
wrong device; fake CUDA tensors show, of the three GEMMs of a layer, each kernel that CUDA lacks and each wait for it.

A torch without CUDA does not index fake CUDA tensors, nor make them contiguous, nor record gradients of them: so the
GEMMs that unfold, emulate or repeat a block's scale are left out, `contiguous` is a copy here, and the parts of the
autograd function are called one by one. Tables (nf4, fp4-radix4) are left out too: the oracle that casts to them on
CUDA copies its table to the device.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.kernels import cuda
from runtime.kernels.cuda import Capability
from runtime.kernels.registry import choose
from runtime.kernels.request import GemmRequest
from runtime.kernels.torch_ops import OPS
from runtime.numerics.casts import to_grid
from runtime.numerics.reference_gemm import NO_KEY
from runtime.numerics.scaling import compute_scale
from runtime.numerics.specs import ROLES, LayerSpec, QuantSpec
from runtime.ops import layer as gemms
from runtime.ops import products
from runtime.ops.layer import cast
from runtime.ops.plan import GemmPlan
from runtime.state import RunState

SPECS = ["e4m3 stochastic row/amax", "dlfloat16", "nf4", "nf4 stochastic", "int8 nearest_even tensor/pow2"]
SPECS += ["e4m3 nearest_even block[3,16]/amax", "mxfp8", "nvfp4", "mxfp4 stochastic"]


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_casts_stay_on_their_device(text: str, dtype: torch.dtype) -> None:
    x, spec = torch.empty(6, 64, device="meta", dtype=dtype), QuantSpec.parse(text)
    grid = to_grid(x, spec, compute_scale(x, spec))
    assert (grid.device.type, grid.shape) == ("meta", x.shape)


class OnlyOnCuda(TorchDispatchMode):
    """Fails at a wait for the device, and at a copy of more than one number between devices. Of an op of ours that runs
    the oracle, for scales alone, it looks at what that does.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.lp.compute_scale.default and not QuantSpec.parse(args[1]).is_block:
            with self:
                return OPS["compute_scale"].run(*args)
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.numel() > 1:
            assert out.is_cuda, f"{func} makes a {out.device} tensor"
        return out


def _layer(x: str, w: str, dy: str, sums: str = "fp32", out: str = "fp32") -> str:
    end = f"{sums} -> {out}"
    return f"fwd: {x} * {w} -> {end}; bwd: {dy} * {w} -> {end}; grad: {dy} * {x} -> {end}"


E4M3, E5M2 = "e4m3 nearest_even", "e5m2 nearest_even"
LAYERS = {
    "mixed": (_layer(E4M3, E4M3, E5M2), "cuda_fp8"),
    "scaled": (_layer(f"{E4M3} tensor/amax", f"{E4M3} tensor/amax", f"{E5M2} tensor/pow2"), "cuda_fp8"),
    "stochastic": (_layer(E4M3, E4M3, "e5m2 stochastic tensor/amax", out="bf16"), "cuda_fp8"),
    "hfp8": (_layer("hfp8-143 nearest_even", "hfp8-143 nearest_even", E5M2), "cuda_bf16"),
    "narrow": (_layer("int4 nearest_even tensor/amax", "int4 nearest_even", "pow2 nearest_even"), "cuda_fp8"),
    "fp16": (_layer(*("fp16 nearest_even",) * 3), "cuda_fp16"),
    "int8": (_layer(*("int8 nearest_even tensor/amax",) * 3, sums="int32"), "cuda_int8"),
    "mx": (_layer(*("mxfp8 nearest_even row",) * 3), "cuda_bf16"),
    "nvfp4": (_layer(*("nvfp4 stochastic row",) * 3), "cuda_bf16"),
    "rows": (_layer(f"{E4M3} row/amax", f"{E4M3} row/amax", E5M2).replace("bwd: e5m2 nearest_even * e4m3 nearest_even"
             " row/amax", f"bwd: {E5M2} * {E4M3}").replace("grad: e5m2 nearest_even * e4m3 nearest_even row/amax",
             f"grad: {E5M2} * {E4M3} column/amax"), "cuda_fp8"),
}  # fmt: skip


KINDS = ("linear", "linear_kn", "matmul")
INDEXED = {("rows", "linear_kn"), ("rows", "matmul"), ("int8", "matmul")}
"""Their scales fold into an operand, or their sums are emulated, and both index."""


@pytest.mark.parametrize(("name", "kind"), [case for case in itertools.product(LAYERS, KINDS) if case not in INDEXED])
def test_the_gemms_of_a_layer_stay_on_cuda_and_wait_for_nothing(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, method = LAYERS[name]
    monkeypatch.setattr(cuda, "current_capability", lambda: Capability("H100", (9, 0)))
    monkeypatch.setattr(Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
    layer = LayerSpec.parse(text)
    methods = [choose(GemmRequest(kind, role, layer.role(role), "cuda")).kernel for role in ROLES]
    if kind != "matmul":
        assert set(methods) == {method}
    else:  # torch's bf16 product rounds before scales could be multiplied in
        roles = [layer.role(role) for role in ROLES]
        is_bf16 = [gemm.out == "bf16" and not (gemm.lhs.has_scale or gemm.rhs.has_scale) for gemm in roles]
        assert methods == ["bf16" if each else "fp32" for each in is_bf16]
    plan, state = GemmPlan.parse(kind, text, ",".join(methods), 1, ""), RunState(watch_overflow=True)
    with FakeTensorMode():
        x = torch.empty(3, 5, 32, device="cuda")
        w = torch.empty({"linear": (16, 32), "linear_kn": (32, 16), "matmul": (3, 32, 16)}[kind], device="cuda")
        bias = None if kind == "matmul" else torch.empty(16, device="cuda")
        with OnlyOnCuda():
            lhs, rhs = (cast(each, spec, state, 1, 0) for each, spec in ((x, layer.fwd.lhs), (w, layer.fwd.rhs)))
            y = products.multiply_fwd(plan, lhs, rhs, bias, NO_KEY)
            dy = gemms.cast_gradient(y, layer.bwd.lhs, state, 1, 4)
            dx = products.multiply_bwd(plan, dy, cast(w, layer.bwd.rhs, state, 1, 6), x.shape, NO_KEY)
            dy = gemms.cast_gradient(y, layer.grad.lhs, state, 1, 5)
            dw = products.multiply_grad(plan, dy, cast(x, layer.grad.rhs, state, 1, 3), w.shape, NO_KEY)
    assert (y.shape, dx.shape, dw.shape) == ((3, 5, 16), x.shape, w.shape)
    assert {each.device.type for each in (y, dx, dw, state.overflow)} == {"cuda"}  # type: ignore[union-attr]


def test_a_wait_is_seen() -> None:
    """The check above, on what it is to find."""
    with FakeTensorMode():
        x = torch.empty(4, device="cuda")
        with OnlyOnCuda(), pytest.raises((AssertionError, DynamicOutputShapeException, RuntimeError)):
            bool(x.amax())
        with OnlyOnCuda(), pytest.raises(AssertionError, match="makes a cpu tensor"):
            x.cpu()
