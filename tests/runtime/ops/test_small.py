"""Small products: the bits of the path that large ones take, whoever watches, and nothing kept of a call."""

import contextlib
import copy
import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lpcompile import lpcompile
from lpcompile.compiled import get_compiled
from runtime.errors import NotSupported
from runtime.kernels.cpu.gemm import gemm_library
from runtime.ops import small

TENSORWISE = """
version: 1
name: tensorwise
source: a test
rules:
  - match: {name: "*"}
    fwd:
      x: {format: e4m3, scale: {granularity: tensor, rule: pow2}}
      w: fp4-radix4
      accumulate: fp32
    bwd:
      dy: {format: e5m2, scale: {granularity: row, rule: pow2}}
      w: {format: int4, scale: {granularity: tensor, rule: amax}}
      accumulate: fp32
    grad:
      dy: {format: e5m2, rounding: toward_zero}
      x: {format: e4m3, scale: {granularity: tensor, rule: amax}}
      accumulate: fp32
"""
FP16_GRADIENTS = """
version: 1
name: fp16-gradients
source: a test
rules:
  - match: {name: "*"}
    fwd: {x: e4m3, w: e4m3}
    bwd:
      dy: {format: fp16, scale: {granularity: row, rule: amax}}
      w: {format: fp16, scale: {granularity: column, rule: amax}}
    grad:
      dy: {format: fp16, scale: {granularity: column, rule: amax}}
      x: {format: fp16, scale: {granularity: column, rule: amax}}
"""
FILES = {"tensorwise": TENSORWISE, "fp16-gradients": FP16_GRADIENTS}
POLICIES = ["hfp8", "fp8-rowwise", "int8", *FILES]

pytestmark = pytest.mark.skipif(
    gemm_library() is None, reason="no kernel with a C function: no bf16 units, or no compiler"
)


def _policy(name: str, tmp_path: Path) -> Any:
    if name not in FILES:
        return name
    (tmp_path / f"{name}.yaml").write_text(FILES[name])
    return tmp_path / f"{name}.yaml"


@pytest.fixture
def large_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sends small products on the path of large ones, or lets them be."""
    largest = small.LARGEST
    return lambda is_large: monkeypatch.setattr(small, "LARGEST", 0 if is_large else largest)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran small: "fwd" where C++ ran a product."""
    seen: list[str] = []
    run = small.SmallProduct.__call__

    def spy(self: small.SmallProduct, *args: Any) -> int:
        seen.append("product")
        return run(self, *args)

    monkeypatch.setattr(small.SmallProduct, "__call__", spy)
    return seen


def _bits(x: Tensor | None) -> Any:
    return None if x is None else x.detach().view(torch.int32).tolist()


def _run(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Any]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return [_bits(y), _bits(x.grad), *(_bits(p.grad) for p in layer.parameters())]


def _values(kind: str, *shape: int) -> Tensor:
    x = torch.randn(*shape)
    flat = x.view(-1)
    if kind == "nan":
        flat[0] = math.nan
    if kind == "inf":
        flat[1 % flat.numel()] = math.inf
    if kind == "zeros":
        flat[: flat.numel() // 2] = 0
    if kind == "tiny":
        flat.mul_(2.0**-130)
    return x * 1000 if kind == "huge" else x


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
@pytest.mark.parametrize("values", ["normal", "nan", "inf", "zeros", "tiny", "huge"])
def test_bits_are_those_of_a_large_product(
    policy: str, layer: Any, values: str, tmp_path: Path, large_path: Callable[[bool], None], calls: list[str]
) -> None:
    if (policy, values) == ("fp16-gradients", "nan"):
        pytest.skip("a large product stores fp16 casts as fp16, which gives a NaN other bits")
    torch.manual_seed(0)
    for shape, n in (
        ((4, 32), 32),
        ((33,), 7),
        ((2, 3, 17), 5),
        ((1, 1), 1),
        ((1, 64), 3),
        ((40, 2), 40),
        ((24, 24), 24),
    ):
        k = shape[-1]
        module = nn.Linear(k, n) if layer is nn.Linear else Conv1D(n, k)
        with torch.no_grad():
            module.bias.normal_()
        model = lpcompile(nn.Sequential(module), _policy(policy, tmp_path))
        get_compiled(model).state.is_scaled = True
        x, dy = _values(values, *shape), _values(values, *shape[:-1], n)
        large_path(False)
        found = _run(model, x, dy)
        assert calls
        calls.clear()
        large_path(True)
        assert found == _run(model, x, dy)
        assert not calls


def test_two_layers_and_threads_do_not_write_into_each_others_casts(tmp_path: Path) -> None:
    """Casts for products in fp32 are made in memory that a thread keeps."""
    torch.manual_seed(0)
    model = lpcompile(nn.Sequential(*(nn.Linear(24, 24) for _ in range(3))), _policy("fp16-gradients", tmp_path))
    get_compiled(model).state.is_scaled = True
    inputs = [torch.randn(24, 24) for _ in range(4)]

    def gradients(x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))

    wanted = [gradients(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found in (list(pool.map(gradients, inputs)) for _ in range(20)):
            assert all(torch.equal(a, b) for one, other in zip(found, wanted) for a, b in zip(one, other))


def test_without_bias_and_without_gradients(calls: list[str], large_path: Callable[[bool], None]) -> None:
    for policy in POLICIES[:3]:
        model = lpcompile(nn.Sequential(nn.Linear(16, 8, bias=False)), policy)
        x = torch.randn(3, 16)
        with torch.no_grad():
            found = _bits(model(x))
            assert calls
            large_path(True)
            assert _bits(model(x)) == found
            large_path(False)
        calls.clear()


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_only_what_needs_a_gradient_gets_one(frozen: str, calls: list[str]) -> None:
    model = lpcompile(nn.Sequential(nn.Linear(16, 8)), "fp8-rowwise")
    x = torch.randn(3, 16, requires_grad=frozen != "x")
    if frozen != "x":
        getattr(model[0], frozen).requires_grad_(False)
    model(x).sum().backward()
    grads = {"x": x.grad, "weight": model[0].weight.grad, "bias": model[0].bias.grad}
    assert {name for name, grad in grads.items() if grad is None} == {frozen}
    assert len(calls) == {"x": 2, "weight": 2, "bias": 3}[frozen]


def test_calls_are_counted_by_role() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(16, 8)), "fp8-rowwise")
    for _ in range(3):
        model(torch.randn(3, 16, requires_grad=True)).sum().backward()
    state = get_compiled(model).state
    assert [state.calls.as_said("0", role) for role in ("fwd", "bwd", "grad")] == [3, 3, 3]
    assert state.gemm_calls == 3


def test_a_gradient_that_saturates_is_noted(calls: list[str]) -> None:
    model = lpcompile(nn.Sequential(nn.Linear(16, 8)), "hfp8")
    state = get_compiled(model).state
    state.is_scaled = state.watch_overflow = True
    y = model(torch.randn(3, 16, requires_grad=True))
    y.backward(torch.full_like(y, 3.0))
    assert not state.overflow
    y = model(torch.randn(3, 16, requires_grad=True))
    y.backward(torch.full_like(y, math.inf))
    assert state.overflow
    assert len(calls) == 6


class _Dispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_who_watches_operations_sees_the_ops(calls: list[str]) -> None:
    model, x = lpcompile(nn.Sequential(nn.Linear(16, 8)), "fp8-rowwise"), torch.randn(3, 16)
    with _Dispatch() as mode:
        model(x)
    assert "lp.fwd.default" in mode.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    assert "lp::fwd" in {event.key for event in profile.key_averages()}
    assert not calls
    model(x)
    assert calls


def test_a_mode_over_the_backward_sees_the_ops() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(16, 8)), "fp8-rowwise")
    y = model(torch.randn(3, 16, requires_grad=True))
    with _Dispatch() as mode:
        y.sum().backward()
    assert {"lp.bwd.default", "lp.grad.default"} <= set(mode.names)


def test_autocast_and_other_dtypes_take_the_large_path(calls: list[str]) -> None:
    model, x = lpcompile(nn.Sequential(nn.Linear(16, 8)), "hfp8"), torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert not calls
    assert torch.equal(model(x.t().contiguous().t()), model(x))
    assert len(calls) == 1


def test_sizes_that_do_not_fit_raise_as_torch_does() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(16, 8)), "hfp8")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(3, 15))


def test_an_input_written_before_backward_raises_as_in_torchs_layer() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(16, 8)), "hfp8")
    x = torch.randn(3, 16)
    y = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_and_pickles_run_small(calls: list[str]) -> None:
    model, x = lpcompile(nn.Sequential(nn.Linear(16, 8)), "fp8-rowwise"), torch.randn(3, 16)
    wanted = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        calls.clear()
        assert torch.equal(copied(x), wanted)
        assert calls


class _Seen(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_under_a_mode_of_functions(calls: list[str]) -> None:
    model, x = lpcompile(nn.Sequential(nn.Linear(16, 8)), "fp8-rowwise"), torch.randn(3, 16)
    wanted = model(x)
    with _Seen():
        assert torch.equal(model(x), wanted)


def test_second_derivatives_are_refused() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(16, 8)), "hfp8")
    x = torch.randn(3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotSupported, match="no second derivative"):
        gradient.sum().backward()


def test_an_operand_that_changed_its_form_before_backward(large_path: Callable[[bool], None]) -> None:
    """What is saved may come back in another dtype, with other strides or of another shape: C++ must not read it so."""
    for change in (
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()),
    ):
        found = []
        for is_large in (False, True):
            torch.manual_seed(0)
            large_path(is_large)
            model = lpcompile(nn.Sequential(nn.Linear(32, 24)), "hfp8")
            x = torch.randn(5, 32, requires_grad=True)
            y = model(x)
            change(model)
            y.sum().backward()
            found.append(_bits(x.grad))
        assert found[0] == found[1]


@pytest.mark.parametrize("shape", [(24, 1 << 20), (3, 4), (0,)])
def test_a_weight_of_another_shape_before_backward_raises(shape: tuple[int, ...]) -> None:
    model = lpcompile(nn.Sequential(nn.Linear(32, 24)), "hfp8")
    y = model(torch.randn(5, 32, requires_grad=True))
    model[0].weight.data = torch.empty(shape)
    with pytest.raises((RuntimeError, IndexError)):
        y.sum().backward()


@pytest.mark.parametrize("policy", POLICIES[:3])
@pytest.mark.parametrize("watched", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["dispatch", "profiler"])
def test_a_checkpoint_saves_the_same_whoever_watches(policy: str, watched: str, mode: str) -> None:
    def watching(part: str) -> Any:
        if part != watched:
            return contextlib.nullcontext()
        return _Dispatch() if mode == "dispatch" else torch.profiler.profile()

    model, x = lpcompile(nn.Sequential(nn.Linear(16, 8)), policy), torch.randn(3, 16, requires_grad=True)
    get_compiled(model).state.is_scaled = True
    with watching("forward"):
        y = checkpoint(model, x, use_reentrant=False)
    with watching("backward"):
        y.sum().backward()
    found = _bits(x.grad)
    assert found == _run(model, x.detach(), torch.ones(3, 8))[1]


@pytest.mark.parametrize("policy", POLICIES[:3])
def test_lazily_negated_and_zero_tensors(policy: str, large_path: Callable[[bool], None]) -> None:
    model, t = lpcompile(nn.Sequential(nn.Linear(32, 24)), policy), torch.randn(5, 32)
    get_compiled(model).state.is_scaled = True
    with torch.no_grad():
        assert torch.equal(model(torch._neg_view(t)), model(-t))
    for dy in (torch._neg_view(torch.randn(5, 24)), torch._efficientzerotensor(5, 24)):
        found = []
        for is_large in (False, True):
            large_path(is_large)
            model.zero_grad()
            x = t.clone().requires_grad_()
            model(x).backward(dy)
            found.append([_bits(x.grad), *(_bits(p.grad) for p in model.parameters())])
        assert found[0] == found[1]


@pytest.mark.parametrize("policy", POLICIES[:3])
def test_gradients_that_are_not_contiguous(policy: str, large_path: Callable[[bool], None]) -> None:
    """Torch sums a bias's gradient in an order that the strides decide."""
    model = lpcompile(nn.Sequential(nn.Linear(32, 24)), policy)
    get_compiled(model).state.is_scaled = True
    x = torch.randn(50, 32)
    for dy in (torch.full((), 0.1).expand(50, 24), torch.randn(24, 50).t(), torch.randn(50, 48)[:, ::2]):
        large_path(False)
        found = _run(model, x, dy)
        large_path(True)
        assert found == _run(model, x, dy)


def test_an_input_of_inference_mode_trains() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(16, 8)), "hfp8")
    with torch.inference_mode():
        x = torch.randn(3, 16)
    model(x).sum().backward()
    assert model[0].weight.grad is not None
