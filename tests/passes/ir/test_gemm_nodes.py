"""Which nodes are GEMMs: every spelling of a product is read alike, and what has no lp form says why."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lpcompile import lpcompile, report
from lpcompile.api import run_state
from lpcompile.frontends.export.trace import export_graph
from lpcompile.policy.resolve import Policy
from passes.ir.gemm_nodes import Composite, GemmNode, Reading, Unreadable, read_gemm, site_names, stem_of
from passes.pipelines import PASSES
from runtime.ops.contractions import ConvGeometry

_RULE = {"match": {"name": "*"}, "fwd": {"x": "e4m3", "w": "e4m3"}}
_EVERY = Policy.model_validate({"version": 1, "name": "p", "rules": [_RULE]})


class _Spellings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight) + x @ self.weight + x.mm(self.weight) + F.linear(x, self.weight)
        z = torch.bmm(y[None], y[None])
        y = torch.addmm(y, x, self.weight) + torch.einsum("ij,jk->ik", x, self.weight)
        z = F.conv1d(torch.baddbmm(z, z, z), self.weight[:, :, None], padding=1)[..., :4]
        return F.scaled_dot_product_attention(z, z, z) + y + y @ y[0]


def _gemms() -> list[Reading]:
    graph = export_graph(_Spellings(), (torch.randn(4, 4),), {}, []).graph
    return [gemm for node in graph.nodes if (gemm := read_gemm(node)) is not None]


def test_every_product_is_seen() -> None:
    assert [stem_of(gemm) for gemm in _gemms()] == [
        "matmul", "matmul", "matmul", "linear", "matmul", "addmm", "einsum", "baddbmm", "conv1d", "sdpa", "matmul",
    ]  # fmt: skip


def test_composites_name_the_pass_that_takes_them_apart() -> None:
    composites = {gemm.stem: gemm for gemm in _gemms() if isinstance(gemm, Composite)}
    assert composites.keys() == {"einsum", "sdpa"}
    assert all(gemm.op == "matmul" and gemm.taken_apart_by in PASSES for gemm in composites.values())
    assert site_names(composites["sdpa"], "attention.sdpa_0") == ["attention.sdpa_0.qk", "attention.sdpa_0.pv"]


def test_what_has_no_lp_form_says_why() -> None:
    assert [gemm.reason for gemm in _gemms() if isinstance(gemm, Unreadable)] == ["a product with a vector is no GEMM"]


@pytest.mark.parametrize(
    ("equation", "operands", "reason"),
    [
        ("ij,jk,kl->il", 3, "two operands"),
        ("...ij,jk->...ik", 2, "ellipsis"),
        ("ii,ij->ij", 2, "diagonal"),
        ("ijm,jk->ik", 2, "one operand only"),
        ("i,j->ij", 2, "no label is summed"),
        ("ij,j->i", 2, "vector"),
    ],
)
def test_an_einsum_that_is_no_product_says_why(equation: str, operands: int, reason: str) -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.einsum, (equation, *(graph.placeholder(f"x{i}") for i in range(operands))))
    gemm = read_gemm(node)
    assert isinstance(gemm, Unreadable)
    assert reason in gemm.reason


@pytest.mark.parametrize(
    ("function", "stem"),
    [
        (lambda x, w: torch.tensordot(x, w, dims=1), "tensordot"),
        (lambda x, w: torch.linalg.multi_dot([x, w, x]), "multi_dot"),
        (lambda x, w: F.bilinear(x, x, w.expand(3, 4, 4)), "bilinear"),
        (lambda x, w: torch.inner(x, w), "inner"),
        (lambda x, w: x.clone().addmm_(x, w), "addmm"),
        (lambda x, w: x[None].clone().baddbmm_(x[None], w[None]), "baddbmm"),
        (lambda x, w: torch.mv(x, w[0]), "mv"),
        (lambda x, w: x.mv(w[0]), "mv"),
        (lambda x, w: torch.addmv(x[0], x, w[0]), "addmv"),
        (lambda x, w: torch.outer(x[0], w[0]), "outer"),
        (lambda x, w: torch.ger(x[0], w[0]), "outer"),
        (lambda x, w: torch.addr(x, x[0], w[0]), "addr"),
        (lambda x, w: torch.dot(x[0], w[0]), "dot"),
        (lambda x, w: torch.vdot(x[0], w[0]), "dot"),
        (lambda x, w: torch.linalg.vecdot(x, w), "vecdot"),
        (lambda x, w: torch.linalg.matrix_power(x, 3), "matrix_power"),
        (lambda x, w: torch.rnn_tanh_cell(x, x, w, w), "rnn_tanh_cell"),
        (lambda x, w: torch.rnn_relu_cell(x, x, w, w), "rnn_relu_cell"),
        (lambda x, w: torch.gru_cell(x, x[:, :2], torch.cat([w, w[:2]]), torch.cat([w, w[:2]])[:, :2]), "gru_cell"),
        (lambda x, w: torch.lstm_cell(x, (x[:, :1], x[:, :1]), w, w[:, :1])[0], "lstm_cell"),
        (lambda x, w: torch.ops.aten.mv(x, w[0]), "mv"),
        (lambda x, w: torch.conv_tbc(x[None], w[None], w[0]), "conv_tbc"),
    ],
)
def test_a_product_that_is_not_built_is_refused_by_name(function: Callable[..., Tensor], stem: str) -> None:
    """It is never silently left in full precision."""

    class Product(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return function(x, w)

    module, inputs = Product(), (torch.randn(4, 4), torch.randn(4, 4))
    lpcompile(module, "fp32-emulated", inputs)
    (row, *_) = report(module).gemms
    assert row.name == f"{stem}_0"
    assert not row.runs_as_policy_says
    assert stem in row.reason


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, w: torch.matmul(input=x, other=w),
    "mm": lambda x, w: torch.mm(input=x, mat2=w),
    "mm-half": lambda x, w: torch.mm(x, mat2=w),
    "bmm": lambda x, w: torch.bmm(input=x[None], mat2=w[None]),
    "addmm": lambda x, w: torch.addmm(input=x, mat1=x, mat2=w),
    "baddbmm": lambda x, w: torch.baddbmm(input=x[None], batch1=x[None], batch2=w[None]),
    "linear": lambda x, w: F.linear(input=x, weight=w),
    "conv1d": lambda x, w: F.conv1d(input=x[None], weight=w[:, :, None]),
    "linalg.matmul": lambda x, w: torch.linalg.matmul(x, w),
    "linalg.matmul-named": lambda x, w: torch.linalg.matmul(input=x, other=w),
    "rmatmul": lambda x, w: w.__rmatmul__(x),
    "aten.mm": lambda x, w: torch.ops.aten.mm(x, w),
    "aten.mm.default": lambda x, w: torch.ops.aten.mm.default(x, w),
    "aten.linear": lambda x, w: torch.ops.aten.linear(x, w),
    "aten.addmm": lambda x, w: torch.ops.aten.addmm(x, x, w),
    "convolution": lambda x, w: torch.convolution(x[None], w[..., None], None, [1], [0], [1], False, [0], 1),
    "convolution-named": lambda x, w: torch.convolution(
        input=x[None],
        weight=w[..., None],
        bias=None,
        stride=(2,),
        padding=(1,),
        dilation=(1,),
        transposed=True,
        output_padding=(1,),
        groups=2,
    ),
    "grouped_mm": lambda x, w: F.grouped_mm(mat_a=x, mat_b=w[None], offs=torch.tensor([4], dtype=torch.int32)),
}


@pytest.mark.parametrize("case", CALLS)
def test_every_way_to_call_a_product_is_read_alike(case: str) -> None:
    model, x = _Product(CALLS[case]), torch.randn(4, 4)
    expected = model(x)
    lpcompile(model, "fp32-emulated", (x,), strict=True)
    assert torch.equal(model(x), expected)
    assert run_state(model).gemm_calls == 1
    lpcompile(model, "hfp8", (x,))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.5)


def test_a_linear_with_a_vector_says_why() -> None:
    model, x = _Product(lambda x, w: F.linear(x, w[0])), torch.randn(4, 4)
    expected = model(x)
    lpcompile(model, "int8", (x,))
    assert {(row.name, row.reason) for row in report(model).gemms} == {
        ("linear_0", "a product with a vector is no GEMM")
    }
    assert torch.equal(model(x), expected)


NOT_REAL: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "int": (lambda x, w: x.long() @ x.long().t(), "matmul_0", "torch.int64"),
    "complex": (lambda x, w: torch.fft.fft(x) @ w.to(torch.complex64), "matmul_0", "torch.complex64"),
    "int-mixed-view": (lambda x, w: torch.bmm(x.int()[None], x.int()[None].mT), "matmul_0", "torch.int32"),
    "einsum": (lambda x, w: torch.einsum("ij,kj->ik", x.long(), x.long()), "einsum_0", "torch.int64"),
    "conv": (lambda x, w: F.conv1d(x.long()[None], x.long()[:, :, None]), "conv1d_0", "torch.int64"),
    "linear": (lambda x, w: F.linear(torch.fft.fft(x), w.to(torch.complex64)), "linear_0", "torch.complex64"),
}


@pytest.mark.parametrize("case", NOT_REAL)
def test_a_product_of_what_is_not_real_is_refused_by_name(case: str) -> None:
    """Its operands have no cast; it runs as torch's op. Where nothing is cast, the lp op runs it."""
    function, name, dtype = NOT_REAL[case]
    model, x = _Product(function), 3 * torch.randn(4, 4)
    expected = model(x)
    lpcompile(model, _EVERY, (x,))
    for row in report(model).gemms:
        assert (row.name, row.fidelity) == (name, "refused")
        assert f"{dtype}, and only real numbers are cast" in row.reason
    assert torch.equal(model(x), expected)
    lpcompile(model, "fp32-emulated", (x,), strict=True)
    assert torch.equal(model(x), expected)


def test_a_layer_of_complex_weights_is_refused_by_name() -> None:
    model, x = nn.Linear(4, 4, dtype=torch.complex64), torch.randn(4, 4, dtype=torch.complex64)
    expected = model(x)
    lpcompile(model, _EVERY)
    assert all("only real numbers are cast" in row.reason for row in report(model).gemms)
    assert torch.equal(model(x), expected)


class _Product(nn.Module):
    """A product of the input with a weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def test_scaled_addmm_says_why() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    gemm = read_gemm(graph.call_function(torch.addmm, (x, x, x), {"alpha": 2}))
    assert isinstance(gemm, Unreadable)
    assert "alpha" in gemm.reason


def test_geometry_of_a_convolution() -> None:
    (conv,) = (gemm for gemm in _gemms() if isinstance(gemm, GemmNode) and gemm.kind == "conv")
    assert conv.geometry == ConvGeometry((1,), (1,), (1,))


@pytest.mark.parametrize(("padding", "kernel", "numbers"), [("same", 3, 2), ("valid", 3, 0), ("same", 2, 1)])
def test_padding_by_name_is_read_as_numbers(padding: str, kernel: int, numbers: int) -> None:
    gemm = _padded_conv(padding, kernel, dilation=2)
    assert isinstance(gemm, GemmNode)
    assert gemm.geometry == ConvGeometry((1,), (numbers,), (2,))


def test_padding_of_one_side_more_says_why() -> None:
    gemm = _padded_conv("same", 2, dilation=1)
    assert isinstance(gemm, Unreadable)
    assert "one side" in gemm.reason


def _padded_conv(padding: str, kernel: int, dilation: int) -> Reading:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, kernel))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x, self.weight, padding=padding, dilation=dilation)

    graph = export_graph(Padded(), (torch.randn(1, 2, 9),), {}, []).graph
    return next(gemm for node in graph.nodes if (gemm := read_gemm(node)) is not None)
