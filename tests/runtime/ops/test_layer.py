"""The three GEMMs against float64 products of the oracle's casts, within the bound of fp32 sums; and the identity,
bit for bit.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import NotSupported
from runtime.kernels.registry import choose, get_kernel
from runtime.kernels.request import GemmRequest
from runtime.numerics import encode, quantize
from runtime.numerics.casts import to_grid
from runtime.numerics.scaling import compute_scale, expand_scale
from runtime.numerics.specs import ROLES, AccumulateSpec, GemmSpec, LayerSpec, QuantSpec, Rounding
from runtime.ops.contractions import ConvGeometry, linear_kn
from runtime.ops.layer import cast, run_gemm
from runtime.ops.plan import GemmPlan, parse_geometry, print_geometry
from runtime.state import RunState
from tests.runtime.ops.test_matrix_product import exact_sums

_GEOMETRY = ConvGeometry((2, 1), (1, 0), (1, 2), 2)
_ONE_D = ConvGeometry((1,), (2,), (1,), 1)


def _plus(add: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.matmul(x, w) if b is None else add(b, x, w)


OPERATIONS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (3, 5, 16), (7, 16), (7,), None),
    "linear_kn": (linear_kn, (3, 5, 16), (16, 7), (7,), None),
    "matmul": (lambda x, w, b: torch.matmul(x, w), (2, 3, 5, 16), (2, 3, 16, 7), None, None),
    "matmul_broadcast": (lambda x, w, b: torch.matmul(x, w), (2, 1, 5, 16), (3, 16, 7), None, None),
    "matmul_folded": (lambda x, w, b: torch.matmul(x, w), (4, 5, 16), (16, 7), None, None),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), 2),
        (2, 4, 9, 9),
        (6, 2, 3, 3),
        (6,),
        _GEOMETRY,
    ),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, 1, 2), (2, 4, 9), (6, 4, 3), (6,), _ONE_D),
    "matmul_folded_left": (lambda x, w, b: torch.matmul(x, w), (5, 16), (4, 16, 7), None, None),
    "matmul_plus_matrix": (lambda x, w, b: _plus(torch.addmm, x, w, b), (5, 16), (16, 7), (5, 7), None),
    "matmul_plus_row": (lambda x, w, b: _plus(torch.addmm, x, w, b), (5, 16), (16, 7), (7,), None),
    "matmul_plus_batch": (lambda x, w, b: _plus(torch.baddbmm, x, w, b), (3, 5, 16), (3, 16, 7), (3, 1, 7), None),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 1), (1, 0), (1, 0), 2, (1, 2)),
        (2, 4, 5, 6),
        (4, 3, 3, 3),
        (6,),
        replace(_GEOMETRY, output_padding=(1, 0)),
    ),
    "conv1d_unbatched": (lambda x, w, b: F.conv1d(x, w, b, 1, 2), (4, 9), (6, 4, 3), (6,), _ONE_D),
    "conv_transpose2d_unbatched": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 1), (1, 0), (1, 0), 2, (1, 2)),
        (4, 5, 6),
        (4, 3, 3, 3),
        (6,),
        replace(_GEOMETRY, output_padding=(1, 0)),
    ),
}

_ROW = {
    "linear": ("row", "row", "row", "column", "column", "column"),
    "linear_kn": ("row", "column", "row", "row", "column", "column"),
}


def _spec(lhs: str, rhs: str, accumulate: str = "fp32", out: str = "fp32") -> GemmSpec:
    return GemmSpec(QuantSpec.parse(lhs), QuantSpec.parse(rhs), AccumulateSpec(accumulate), out)


def _layer(kind: str, how: str) -> LayerSpec:
    if how == "plain":
        return LayerSpec(
            *(_spec(*pair) for pair in (("hfp8-143", "hfp8-143"), ("e5m2", "hfp8-143"), ("e5m2", "hfp8-143")))
        )
    if how == "tensor":
        pairs = (
            ("e4m3 nearest_even tensor/amax", "int8 nearest_even tensor/pow2"),
            ("e5m2 nearest_even tensor/amax", "e4m3"),
        )
        return LayerSpec(*(_spec(*pair) for pair in (*pairs, ("fp32", "e4m3 nearest_even tensor/amax"))))
    if how == "free axis":
        axes = _ROW.get(kind, _ROW["linear_kn"])
        casts = [f"e4m3 nearest_even {axis}/amax" for axis in axes]
        return LayerSpec(_spec(casts[0], casts[1]), _spec(casts[2], casts[3]), _spec(casts[4], casts[5]))
    assert how == "along the sum"
    cast_text = "e4m3 nearest_even block[2,4]/pow2"
    return LayerSpec(*(_spec(cast_text, cast_text) for _ in ROLES))


def _value(x: Tensor, spec: QuantSpec) -> Tensor:
    """The cast value of x by the oracle, in float64."""
    if spec.is_identity:
        return x.double()
    scale = compute_scale(x, spec)
    expanded = None if scale is None else expand_scale(scale, x.shape, spec)
    grid = quantize(x if expanded is None else x / expanded, spec.format, spec.rounding)
    return grid.double() if expanded is None else grid.double() * expanded.double()


def _run(name: str, layer: LayerSpec, seed: int = 0) -> tuple[dict[str, Tensor], tuple[Tensor, ...], RunState]:
    operation, x_shape, w_shape, b_shape, geometry = OPERATIONS[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(x_shape, generator=generator, requires_grad=True)
    w = torch.randn(w_shape, generator=generator, requires_grad=True)
    b = torch.randn(b_shape, generator=generator, requires_grad=True) if b_shape else None
    dy = torch.randn(operation(x, w, b).shape, generator=generator)
    kind = "conv" if geometry else name.split("_broadcast")[0].split("_folded")[0].split("_plus")[0]
    methods = tuple(choose(GemmRequest(kind, role, layer.role(role))).kernel for role in ROLES)
    state = RunState(watch_overflow=True)
    plan = GemmPlan(kind, layer, methods, 0, geometry)  # type: ignore[arg-type]
    is_weight = not name.startswith("matmul")
    casts = {
        "fwd_lhs": cast(x, layer.fwd.lhs, state, 0, 0),
        "fwd_rhs": cast(w, layer.fwd.rhs, state, 0, 1),
        "bwd_rhs": None if is_weight else cast(w, layer.bwd.rhs, state, 0, 2),
        "grad_lhs": cast(x, layer.grad.rhs, state, 0, 3),
    }
    y = run_gemm(x, w, b, casts, state, plan)  # type: ignore[arg-type]
    y.backward(dy)
    grads = {"dx": x.grad, "dw": w.grad} | ({"db": b.grad} if b is not None else {})
    return {"y": y.detach(), **grads}, (x.detach(), w.detach(), b, dy), state  # type: ignore[dict-item]


def _expected(name: str, layer: LayerSpec, inputs: tuple[Tensor, ...], magnitude: bool = False) -> dict[str, Tensor]:
    """Each role by autograd in float64 on the oracle's casts; with `magnitude` the same on absolute values, for the
    bound.
    """
    operation = OPERATIONS[name][0]
    x, w, b, dy = inputs
    size = torch.abs if magnitude else (lambda t: t)
    cast_of = {
        role: (size(_value_of(role, "lhs", layer, inputs)), size(_value_of(role, "rhs", layer, inputs)))
        for role in ROLES
    }
    bias = None if b is None else size(b.detach().double())
    out = {"y": operation(*cast_of["fwd"], bias)}
    x64 = x.double().requires_grad_()
    operation(x64, cast_of["bwd"][1], None).backward(cast_of["bwd"][0])
    w64 = w.double().requires_grad_()
    operation(cast_of["grad"][1], w64, None).backward(cast_of["grad"][0])
    out |= {"dx": x64.grad, "dw": w64.grad}
    if b is not None:
        channels = dy.dim() - w.dim() + 1  # the dim of them: there may be none of samples before it
        dims = [dim for dim in range(dy.dim()) if dim != channels] if name.startswith("conv") else []
        out["db"] = size(dy.double()).sum(dims).view(b.shape) if dims else size(dy.double()).sum_to_size(b.shape)
    return out


def _value_of(role: str, side: str, layer: LayerSpec, inputs: tuple[Tensor, ...]) -> Tensor:
    x, w, _, dy = inputs
    tensor = {
        ("fwd", "lhs"): x,
        ("fwd", "rhs"): w,
        ("bwd", "lhs"): dy,
        ("bwd", "rhs"): w,
        ("grad", "lhs"): dy,
        ("grad", "rhs"): x,
    }
    return _value(tensor[role, side], getattr(layer.role(role), side))  # type: ignore[arg-type]


_PER_TENSOR = ("plain", "tensor")  # all that a convolution takes
_ALL = (*_PER_TENSOR, "free axis", "along the sum")


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in OPERATIONS for how in (_PER_TENSOR if name.startswith("conv") else _ALL)],
)
def test_three_gemms_equal_float64_products_of_the_casts(name: str, how: str) -> None:
    layer = _layer(name, how)
    results, inputs, _ = _run(name, layer)
    exact, bound = _expected(name, layer, inputs), _expected(name, layer, inputs, magnitude=True)
    for key, value in results.items():
        error = (value.double() - exact[key]).abs()
        assert (error <= 64 * 2.0**-24 * bound[key] + 1e-30).all(), (key, error.max())


@pytest.mark.parametrize("name", OPERATIONS)
def test_identity_is_bitwise_the_native_op(name: str) -> None:
    results, (x, w, b, dy), state = _run(name, LayerSpec())
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    b = None if b is None else b.detach().clone().requires_grad_()
    y = OPERATIONS[name][0](x, w, b)
    y.backward(dy)
    assert torch.equal(results["y"], y)
    assert torch.equal(results["dx"], x.grad)
    assert torch.equal(results["dw"], w.grad)
    assert b is None or torch.equal(results["db"], b.grad)
    assert state.gemm_calls == 1


def test_bf16_output_is_the_fp32_sum_rounded_once() -> None:
    layer = LayerSpec(*(_spec("bf16", "bf16", out="bf16") for _ in ROLES))
    results, inputs, _ = _run("linear", layer)
    exact, bound = _expected("linear", layer, inputs), _expected("linear", layer, inputs, magnitude=True)
    for key in ("dx", "dw"):
        assert torch.equal(results[key], results[key].bfloat16().float())
        assert ((results[key] - exact[key]).abs() <= 2.0**-8 * exact[key].abs() + 2.0**-20 * bound[key]).all()


def test_int8_sums_are_exact() -> None:
    row, column = "int8 nearest_even row/amax", "int8 nearest_even column/amax"
    layer = LayerSpec(_spec(row, row, "int32"), _spec(row, column, "int32"), _spec(column, column, "int32"))
    assert choose(GemmRequest("linear", "fwd", layer.fwd)).fidelity == "bitwise"
    results, (x, w, b, _), _ = _run("linear", layer)
    qx, qw = cast(x, layer.fwd.lhs, None, 0, 0), cast(w, layer.fwd.rhs, None, 0, 0)
    sums = (qx.grid.long().reshape(-1, 16) @ qw.grid.long().t()).float().view(3, 5, 7)
    assert torch.equal(results["y"], sums * qx.scale * qw.scale.reshape(1, -1) + b)


def test_an_int8_sum_that_could_leave_int32_is_refused() -> None:
    long = torch.ones(1, 140_000, dtype=torch.int8)
    with pytest.raises(NotSupported, match="can overflow int32"):
        get_kernel("int8").multiply(long, long.t(), _spec("int8", "int8", "int32"))


def test_gradient_beyond_the_format_saturates_and_is_told() -> None:
    layer = _layer("linear", "plain")
    x, w = torch.ones(2, 16, requires_grad=True), torch.ones(3, 16, requires_grad=True)
    state = RunState(watch_overflow=True)
    plan = GemmPlan("linear", layer, ("fp32", "fp32", "fp32"), 0)
    casts = {
        "fwd_lhs": cast(x, layer.fwd.lhs, state, 0, 0),
        "fwd_rhs": cast(w, layer.fwd.rhs, state, 0, 1),
        "bwd_rhs": None,
    }
    casts["grad_lhs"] = casts["fwd_lhs"]
    run_gemm(x, w, None, casts, state, plan).backward(torch.full((2, 3), 57344.0), retain_graph=True)
    assert not state.overflow
    run_gemm(x, w, None, casts, state, plan).backward(torch.full((2, 3), 1e6))
    assert state.overflow
    assert torch.equal(x.grad[0], torch.full((16,), 2 * 3 * 57344.0))


def test_frozen_operands_get_no_gradient_and_save_nothing() -> None:
    layer = _layer("linear", "plain")
    state, plan = RunState(), GemmPlan("linear", layer, ("fp32", "fp32", "fp32"), 0)
    x, w = torch.randn(2, 16), torch.randn(3, 16, requires_grad=True)
    casts = {
        "fwd_lhs": cast(x, layer.fwd.lhs, state, 0, 0),
        "fwd_rhs": cast(w, layer.fwd.rhs, state, 0, 1),
        "bwd_rhs": None,
    }
    casts["grad_lhs"] = casts["fwd_lhs"]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = run_gemm(x, w, None, casts, state, plan)
    y.sum().backward()
    assert x.grad is None
    assert w.grad is not None
    assert len(saved) == 1, "only GRAD's operand"


@pytest.mark.parametrize(("name", "dtype"), [
    *((name, torch.bfloat16) for name in ("e4m3", "e5m2", "hfp8-143", "e3m2", "e2m3", "e2m1", "fp4-radix4", "e8m0")),
    *((name, torch.bfloat16) for name in ("bf16", "int4", "int8:range=full", "uint8", "pow2", "ternary", "1-5-7")),
    *((name, torch.bfloat16) for name in ("mxfp8", "mxfp6-e3m2", "mxint8", "nvfp4", "mxfp4:scale=even")),
    *((name, torch.float32) for name in ("fp32", "dlfloat16", "1-6-9", "tf32", "nf4", "int16", "uint9")),
    ("fp16", torch.float16),
    ("int8", torch.int8),
])  # fmt: skip
def test_grid_values_are_held_in_the_smallest_dtype_that_has_them(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)) * 4
    spec = QuantSpec.parse(name)
    held = cast(x, spec, None, 0, 0).grid
    assert held.dtype == (dtype if not spec.is_identity else x.dtype)
    assert torch.equal(held.float(), to_grid(x, spec, None))
    assert torch.equal(cast(x.double(), spec, None, 0, 0).grid.float(), held.float())


def test_geometry_prints_and_parses() -> None:
    assert parse_geometry(print_geometry(_GEOMETRY)) == _GEOMETRY
    assert parse_geometry("") is None


@pytest.mark.parametrize("how", _PER_TENSOR)
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_a_gemm_gives_may_be_written_in_place(name: str, how: str) -> None:
    """As a relu(inplace=True) after a layer, or `y += x` in a residual block, does; also where no bias is added."""
    _, x_shape, w_shape, b_shape, geometry = OPERATIONS[name]
    layer = _layer(name, how)
    for has_bias in {False, b_shape is not None}:
        torch.manual_seed(0)
        x, w = torch.randn(x_shape, requires_grad=True), torch.randn(w_shape, requires_grad=True)
        b = torch.randn(b_shape, requires_grad=True) if has_bias else None
        kind = "conv" if geometry else name.split("_broadcast")[0].split("_folded")[0].split("_plus")[0]
        methods = tuple(choose(GemmRequest(kind, role, layer.role(role))).kernel for role in ROLES)
        plan = GemmPlan(kind, layer, methods, 0, geometry)  # type: ignore[arg-type]
        names = {"fwd_lhs": (x, layer.fwd.lhs), "fwd_rhs": (w, layer.fwd.rhs), "grad_lhs": (x, layer.grad.rhs)}
        casts = {key: cast(value, spec, None, 0, 0) for key, (value, spec) in names.items()}
        casts["bwd_rhs"] = cast(w, layer.bwd.rhs, None, 0, 2)
        found = []
        for write in (lambda y: y.mul_(2.0), lambda y: y * 2.0):
            x.grad = w.grad = None
            y = write(run_gemm(x, w, b, casts, RunState(), plan))  # type: ignore[arg-type]
            y.backward(torch.ones_like(y))
            found.append((y.detach(), x.grad, w.grad))
        assert all(torch.equal(left, right) for left, right in zip(*found))


@pytest.mark.parametrize("mode", ["nearest_even", "toward_zero"])
def test_batched_products_of_activations_add_as_told_in_every_role(mode: Rounding) -> None:
    """Attention's kind of product, FWD, BWD and GRAD, each matrix of the batch against sums of fractions."""
    how = AccumulateSpec("1-6-9", 3, mode)
    pairs = (("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e5m2", "e4m3"))
    layer = LayerSpec(*(GemmSpec(QuantSpec(lhs), QuantSpec(rhs), how) for lhs, rhs in pairs))
    results, (x, w, _, dy), _ = _run("matmul", layer)
    a, b, d = quantize(x, "e4m3"), quantize(w, "e4m3"), quantize(dy, "e5m2")
    for batch in itertools.product(range(2), range(3)):
        assert torch.equal(results["y"][batch], exact_sums(a[batch], b[batch], how))
        assert torch.equal(results["dx"][batch], exact_sums(d[batch], b[batch].mT, how))
        assert torch.equal(results["dw"][batch], exact_sums(a[batch].mT, d[batch], how))


@pytest.mark.parametrize(("accumulate", "fidelity"), [("fp32", "format-exact"), ("int32", "bitwise")])
def test_affine_operands_need_no_correction(accumulate: str, fidelity: str) -> None:
    """uint8 with a zero point times int8: the grid values are code - zero, whole numbers that bf16 holds."""
    spec = _spec("uint8:zero=2", "int8", accumulate)
    layer = LayerSpec(spec, _spec("fp32", "fp32"), _spec("fp32", "fp32"))
    assert choose(GemmRequest("linear", "fwd", spec)).fidelity == fidelity
    results, (x, w, b, _), _ = _run("linear", layer)
    codes = encode(x, "uint8:zero=2").long() - 2
    assert int(codes.min()) < 0
    sums = (codes.reshape(-1, 16) @ quantize(w, "int8").long().t()).float().view(3, 5, 7)
    assert torch.allclose(results["y"] - b.detach(), sums, rtol=0, atol=1e-5)  # a bias is added somewhere
