"""Grid ops: the cast of a result and the op on casts are the same bits, for every format, NaN, Inf and -0 too."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.analysis.grid_ops import GridOp, moves_scale, read_grid_op, scale_behind, why_not_on_grid
from passes.ir.types import META, tensor_meta
from runtime.numerics.formats import FORMATS
from runtime.numerics.scaling import compute_scale
from runtime.numerics.specs import QuantSpec
from runtime.ops.layer import cast
from runtime.ops.types import TensorType
from runtime.quantize.quantizer import to_grid

Build = Callable[[fx.Graph, fx.Node], fx.Node]

_OPS: dict[str, Build] = {
    "relu": lambda g, x: g.call_function(torch.relu, (x,)),
    "max_pool2d": lambda g, x: g.call_function(F.max_pool2d, (x, 3), {"stride": 2, "padding": 1}),
    "reshape": lambda g, x: g.call_function(torch.Tensor.reshape, (x, 2, -1, 8)),
    "view": lambda g, x: g.call_function(torch.Tensor.view, (x, (24, 8, 8))),
    "flatten": lambda g, x: g.call_function(torch.flatten, (x, 0, 2)),
    "unsqueeze": lambda g, x: g.call_function(torch.Tensor.unsqueeze, (x, 1)),
    "transpose": lambda g, x: g.call_function(torch.Tensor.transpose, (x, 1, -1)),
    "permute": lambda g, x: g.call_function(torch.Tensor.permute, (x, 0, 2, 3, 1)),
    "expand": lambda g, x: g.call_function(torch.Tensor.expand, (x, 2, 4, 6, 8, 8)),
    "slice": lambda g, x: g.call_function(torch.Tensor.__getitem__, (x, (slice(None), slice(1, 3)))),
    "cat": lambda g, x: g.call_function(torch.cat, ([x, x], 1)),
}


def _x(has_nan: bool = True) -> Tensor:
    """(4, 6, 8, 8): normals, numbers too small for any format here, both zeros, both infinities, NaN."""
    x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    edges = [0.0, -0.0, 1e-9, -1e-9, -1e-30, -1e-44, 500.0, -500.0, float("inf"), -float("inf")]
    x[0] = torch.tensor(edges).repeat(200)[: x[0].numel()].reshape(x[0].shape)
    x[1] *= 1e-3
    if has_nan:
        x[2, :, 2, ::3] = float("nan")
    return x


def _read(build: Build, x: Tensor) -> tuple[GridOp, fx.Graph]:
    graph = fx.Graph()
    source = graph.placeholder("x")
    node = build(graph, source)
    for each, shape in ((source, x.shape), (node, _run(graph, node, x).shape)):
        each.meta[META] = tensor_meta(TensorType(tuple(shape), torch.float32))
    op = read_grid_op(node)
    assert op is not None
    return op, graph


def _run(graph: fx.Graph, node: fx.Node, x: Tensor) -> Tensor:
    """The value of a node; what else is in the graph stays."""
    ended = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for each in graph.nodes:
        copies[each] = ended.node_copy(each, lambda old: copies[old])
        if each is node:
            break
    ended.output(copies[node])
    result: Tensor = fx.GraphModule(torch.nn.Module(), ended)(x)
    return result


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN counts as NaN, whatever its payload."""
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    return (
        torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())
        and (torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5)))
    )


def _on_grid(op: GridOp, q: Tensor) -> Tensor:
    graph = fx.Graph()
    source = graph.placeholder("x")
    return _run(graph, op.replay(graph, {op.inputs[0]: source}), q)


@pytest.mark.parametrize("name", _OPS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
def test_the_op_on_grid_values_is_the_cast_of_the_op(name: str, format: str, rounding: str) -> None:
    spec = QuantSpec.parse(f"{format} {rounding}")
    if spec.is_identity or (
        format == "int1" and rounding == "toward_zero"
    ):  # the first is no cast, the second none yet
        return
    x = _x()
    op, graph = _read(_OPS[name], x)
    reason = why_not_on_grid(op, spec, finite=False, sees_zero_signs=True)
    wanted = to_grid(_run(graph, op.node, x), None, spec)
    got = _on_grid(op, to_grid(x, None, spec))
    if reason is None:
        assert _same_bits(got, wanted)
    elif why_not_on_grid(op, spec, finite=False, sees_zero_signs=False) is None:
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num()), "the sign of a zero is all that differs"
        assert op.kind == "pool" or not _same_bits(got, wanted)


def test_int8_is_pooled_where_no_window_holds_a_nan_and_only_there() -> None:
    spec = QuantSpec.parse("int8 nearest_even")
    op, graph = _read(_OPS["max_pool2d"], _x())
    for x, is_same in ((_x(has_nan=False), True), (_x(), False)):
        wanted = to_grid(_run(graph, op.node, x), None, spec)
        assert torch.equal(_on_grid(op, to_grid(x, None, spec)), wanted) is is_same
    assert why_not_on_grid(op, spec, finite=True, sees_zero_signs=True) is None
    reason = why_not_on_grid(op, spec, finite=False, sees_zero_signs=True)
    assert reason == "int8 has no NaN, which a window should have that holds one; finite=true says that none does"


@pytest.mark.parametrize("name", ["reshape", "view", "flatten", "unsqueeze", "transpose", "permute", "expand"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_a_scale_that_moves_is_the_scale_of_the_result(name: str, granularity: str) -> None:
    spec, x = QuantSpec.parse(f"e4m3 nearest_even {granularity}/amax"), _x()
    op, graph = _read(_OPS[name], x)
    if not moves_scale(op, spec, is_nonnegative=False):
        assert granularity != "tensor"
        return
    wanted = cast(_run(graph, op.node, x), spec, None, 0, 0)
    before = cast(x, spec, None, 0, 0)
    assert before.scale is not None
    assert wanted.scale is not None
    scales = fx.Graph()
    source = scales.placeholder("x")
    scale = _run(scales, scale_behind(scales, op, source, spec), before.scale)
    assert torch.equal(scale, wanted.scale)
    assert scale.shape == wanted.scale.shape
    assert _same_bits(_on_grid(op, before.grid), wanted.grid)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "covers"),
    [(2, 2, 0, False), (3, 2, 1, True), (3, 1, 0, True), (2, 3, 1, False), (5, 3, 2, True), (3, 3, 1, False)],
)
def test_the_scale_of_a_pooled_tensor_is_that_of_the_tensor_where_every_element_is_in_a_window(
    kernel: int, stride: int, padding: int, covers: bool
) -> None:
    spec = QuantSpec.parse("e4m3 nearest_even tensor/amax")
    arguments = {"kernel_size": kernel, "stride": stride, "padding": padding}
    op, _ = _read(lambda g, x: g.call_function(F.max_pool2d, (x,), arguments), _x())
    assert moves_scale(op, spec, is_nonnegative=True) is covers
    assert not moves_scale(op, spec, is_nonnegative=False)
    corners = 0
    for size in range(6, 14):  # the largest element at each place
        for place in range(size):
            x = torch.zeros(1, 1, size, size)
            x[0, 0, place, place] = 3.0
            pooled = F.max_pool2d(x, **arguments)
            corners += not torch.equal(compute_scale(pooled, spec), compute_scale(x, spec))  # type: ignore[arg-type]
    assert (corners == 0) is covers


def test_what_writes_or_picks_by_tensors_is_no_grid_op() -> None:
    graph = fx.Graph()
    x, index = graph.placeholder("x"), graph.placeholder("index")
    for call in (
        graph.call_function(F.relu, (x,), {"inplace": True}),
        graph.call_function(torch.Tensor.__getitem__, (x, index)),
        graph.call_function(torch.Tensor.view, (x, torch.int32)),
        graph.call_function(F.max_pool2d, (x, 2), {"return_indices": True}),
        graph.call_function(torch.add, (x, x)),
    ):
        assert read_grid_op(call) is None
