"""quantize in C++: the oracle's bits, into tensors that are there, and as a node of fx, make_fx and export."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from runtime.errors import FormatError
from runtime.kernels.cast import values as value_cast
from runtime.kernels.cast_plans import table_plan
from runtime.numerics import decode, get_format, quantize
from runtime.numerics.block_casts import quantize_blocks
from runtime.numerics.grid import round_to_grid
from runtime.numerics.specs import ROUNDINGS
from tests.machine_facts import needs_kernels
from tests.runtime.kernels.test_block_cast import hard_blocks
from tests.runtime.kernels.test_cast import DECLINED, NAMES, hard_values

DRAW = {"seed": 2**40 + 5, "step": 2, "stream": (7 << 33) + 7, "offset": 13}


def same_bits(a: Tensor, b: Tensor) -> bool:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


def by_the_oracle(x: Tensor, name: str, mode: str, scale: Tensor | None = None) -> Tensor:
    q = round_to_grid(x, get_format(name), mode, scale, **DRAW)  # type: ignore[arg-type]
    return (q if scale is None else q * scale).to(x.dtype)


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_oracle_in_every_mode_and_dtype(name: str) -> None:
    for mode, dtype in itertools.product(ROUNDINGS, (torch.float32, torch.bfloat16, torch.float16)):
        if (name, mode) == ("int1", "toward_zero"):
            continue
        x = hard_values(name).to(dtype)
        assert value_cast.is_served(x, name, mode, None) == (name not in DECLINED)
        expected = by_the_oracle(x, name, mode)
        assert same_bits(quantize(x, name, mode, **DRAW), expected), (mode, dtype)
        out = torch.full_like(x, 7.0)
        assert quantize(x, name, mode, out=out, **DRAW) is out
        assert same_bits(out, expected)
        assert same_bits(quantize(x, name, mode, out=x, **DRAW), expected)
        assert same_bits(x, expected)


@pytest.mark.parametrize("name", ["e4m3", "nf4", "dlfloat16"])
@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (5, 7), (7,), (3, 1, 1), (3, 5, 1), (1, 1, 7), (3, 1, 7)])
def test_a_scale_of_any_shape_that_broadcasts(name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(shape, generator=generator) + 0.1
    for dtype, mode in itertools.product(
        (torch.float32, torch.bfloat16, torch.float64), ("nearest_even", "stochastic")
    ):
        x = (torch.randn(3, 5, 7, generator=generator) * 3).to(dtype)
        expected = by_the_oracle(x, name, mode, scale.to(torch.float64 if dtype == torch.float64 else torch.float32))
        assert same_bits(quantize(x, name, mode, scale, **DRAW), expected)
        out = torch.empty_like(x)
        assert same_bits(quantize(x, name, mode, scale, out=out, **DRAW), expected)


@pytest.mark.parametrize("name", ["e4m3", "nf4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_that_is_shared_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """x itself, x shifted by one element, x transposed, a strided out, the scale inside out."""
    base = (torch.randn(65, 64, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    expected = quantize(base[:64], name)
    same = base.clone()
    assert same_bits(quantize(same[:64], name, out=same[:64]), expected)
    shifted = base.clone().view(-1)
    into = shifted[1 : 1 + 64 * 64].view(64, 64)
    assert same_bits(quantize(shifted[: 64 * 64].view(64, 64), name, out=into), expected)
    turned = base[:64].clone()
    assert same_bits(quantize(turned, name, out=turned.t()), expected)
    strided = torch.zeros(64, 128, dtype=dtype)
    assert same_bits(quantize(base[:64], name, out=strided[:, ::2]), expected)
    assert not bool(strided[:, 1::2].any())
    if dtype == torch.float32 and name in ("e4m3", "nf4"):
        out = torch.rand(64, 64) + 0.5
        scale = out[:, :1]
        want = quantize(base[:64], name, scale=scale.clone())
        assert same_bits(quantize(base[:64], name, scale=scale, out=out), want)


def test_what_cannot_be_written_is_refused_in_four_parts() -> None:
    x = torch.ones(3, 4)
    for out, what, expected in (
        (torch.empty(4, 3), "the shape of x", "Expected (3, 4). Got (4, 3)"),
        (torch.empty(3, 4, dtype=torch.bfloat16), "the dtype of x", "Expected torch.float32. Got torch.bfloat16"),
        (torch.empty(3, 4, device="meta"), "the device of x", "Expected cpu. Got meta"),
        (torch.empty(3, 1).expand(3, 4), "cannot be written", "expanded from fewer elements. Try out.contiguous()"),
        (torch.empty(3, 4, requires_grad=True), "cannot be written", "that requires a gradient. Try out.detach()"),
    ):  # fmt: skip
        for name in ("e4m3", "mxfp8"):
            with pytest.raises(FormatError) as caught:
                quantize(x, name, out=out)
            said = str(caught.value)
            assert said.startswith("quantize: out ")
            assert what in said
            assert expected in said
            assert "Try" in said


@needs_kernels
@pytest.mark.parametrize("name", ["mxfp8", "mxint8:scale=rceil", "nvfp4"])
def test_block_formats_into_out(name: str) -> None:
    for columns, mode in itertools.product((128, 75), ROUNDINGS):
        x = hard_blocks(columns)
        expected, out = quantize_blocks(x, name, mode, **DRAW), torch.empty_like(x)
        assert same_bits(quantize(x, name, mode, out=out, **DRAW), expected)
        assert same_bits(quantize(x, name, mode, out=x, **DRAW), expected)


class Around(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return quantize(x * 2, "e4m3") + quantize(x, "e5m2", "stochastic", 0.5, seed=3)


@needs_kernels
def test_make_fx_sees_one_node_with_its_shape() -> None:
    x = torch.randn(4, 6)
    graph = make_fx(Around())(x)
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.lp.quantize_values.default]
    assert len(calls) == 2
    assert torch.equal(graph(x), Around()(x))
    fake = make_fx(Around(), tracing_mode="fake")(x)
    assert torch.equal(fake(x), Around()(x))
    with FakeTensorMode():
        y = quantize(torch.empty(3, 5, dtype=torch.bfloat16), "e4m3")
        assert (y.shape, y.dtype) == ((3, 5), torch.bfloat16)


def test_export_has_the_bits_of_eager_code() -> None:
    x = torch.randn(4, 6) * 10
    for strict in (False, True):
        exported = torch.export.export(Around(), (x,), strict=strict).module()
        assert torch.equal(exported(x), Around()(x))


@needs_kernels
def test_compiled_code_writes_into_out() -> None:
    x, out = torch.randn(4, 6), torch.empty(4, 6)
    torch._dynamo.reset()

    def cast(x: Tensor, out: Tensor) -> Tensor:
        return quantize(x, "e4m3", out=out)

    assert torch.equal(torch.compile(cast)(x, out), quantize(x, "e4m3"))
    assert torch.equal(out, quantize(x, "e4m3"))


def test_the_op_has_a_straight_through_gradient_and_quantize_has_none() -> None:
    x = torch.tensor([0.3, 1e9, math.nan, -5.1], requires_grad=True)
    assert not quantize(x, "e4m3").requires_grad
    y = torch.ops.lp.quantize_values(x, torch.tensor(0.7), "e4m3", "nearest_even", 0, 0, 0, 0)
    (got,) = torch.autograd.grad(y, x, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert got.tolist() == [1, 2, 3, 4]
    assert same_bits(y.detach(), quantize(x.detach(), "e4m3", scale=0.7))


def test_the_ops_keep_what_torch_asks_of_an_op() -> None:
    x, scale, out = torch.randn(4, 6, requires_grad=True), torch.tensor(0.5), torch.empty(4, 6)
    given = ("e4m3", "nearest_even", 1, 2, 3, 4)
    torch.library.opcheck(torch.ops.lp.quantize_values.default, (x, scale, *given))
    torch.library.opcheck(torch.ops.lp.quantize_values_into.default, (x.detach(), scale, out, *given))


def test_without_a_kernel_the_op_takes_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(1))
    expected, out = quantize(x, "e4m3", "stochastic", 0.3, seed=1), torch.empty(50)
    monkeypatch.setattr(value_cast, "cast_library", lambda: None)
    assert torch.equal(quantize(x, "e4m3", "stochastic", 0.3, seed=1), expected)
    assert torch.equal(quantize(x, "e4m3", "stochastic", 0.3, seed=1, out=out), expected)
    assert torch.equal(torch.ops.lp.quantize_values(x, torch.tensor(0.3), "e4m3", "stochastic", 1, 0, 0, 0), expected)


@pytest.mark.parametrize("name", ["nf4", "int1", "fp4-radix4", "pow2"])
def test_a_table_is_traced_by_a_process_that_has_not_cast_with_it(name: str) -> None:
    table_plan.cache_clear()
    x = torch.randn(5, 7)
    graph = make_fx(lambda x: quantize(x, name), tracing_mode="fake")(x)
    assert torch.equal(graph(x), quantize(x, name))
    table_plan.cache_clear()
    with FakeTensorMode() as mode:
        assert quantize(mode.from_tensor(x), name).shape == x.shape
    assert quantize(x.to("meta"), name, scale=2.0).shape == x.shape


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_scale_that_is_computed_is_traced(mode: str) -> None:
    def cast(x: Tensor) -> Tensor:
        return quantize(x, "e4m3", scale=x.abs().amax(-1, keepdim=True) / 448)

    x, other = torch.randn(4, 9), torch.randn(4, 9)
    assert torch.equal(make_fx(cast, tracing_mode=mode)(x)(other), cast(other))


@pytest.mark.parametrize(
    "scale", [torch.tensor(2 + 1j), torch.ones(5), torch.ones(3, 4, 6)], ids=["complex", "5", "3-d"]
)
def test_a_scale_that_does_not_fit_is_refused(scale: Tensor) -> None:
    with pytest.raises(FormatError, match="scale"):
        quantize(torch.ones(4, 6), "e4m3", scale=scale)


def test_what_is_no_tensor_and_what_is_no_format_is_refused() -> None:
    for bad in ([1.0, 2.0], 3.0):
        with pytest.raises(FormatError, match="only tensors"):
            quantize(bad, "e4m3")  # type: ignore[arg-type]
    for name in (None, 8):
        with pytest.raises(FormatError, match="not a format"):
            quantize(torch.ones(3), name)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="codes are integers"):
        decode(torch.ones(3), "e4m3")
