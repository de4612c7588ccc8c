"""The C++ epilogue against torch's operations one after another, bit for bit: shapes of scales, NaN, signed zeros."""

import itertools

import pytest
import torch
from torch import Tensor

from runtime.kernels.cpu import epilogue
from runtime.kernels.cpu.epilogue import epilogue_library, finish

pytestmark = pytest.mark.skipif(epilogue_library() is None, reason="needs a C++ compiler")

_M, _N = 37, 53


def _values(*shape: int, seed: int) -> Tensor:
    """Values of very different sizes, among them NaN, infinities and both zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.ldexp(torch.randn(shape, generator=generator), torch.randint(-40, 40, shape, generator=generator))
    flat = x.view(-1)
    for number, special in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0)):
        flat[number::17] = special
    return x


def _wanted(y: Tensor, s: Tensor | None, t: Tensor | None, b: Tensor | None, r: Tensor | None, relu: bool) -> Tensor:
    y = y if s is None else y * s
    y = y if t is None else y * t
    y = y if b is None else y + b
    y = y if r is None else y + r
    return torch.relu(y) if relu else y


def _same(got: Tensor, wanted: Tensor) -> bool:
    """Equal bits; a NaN is a NaN."""
    return torch.equal(got.nan_to_num(7.5).view(torch.int32), wanted.nan_to_num(7.5).view(torch.int32)) and torch.equal(
        got.isnan(), wanted.isnan()
    )


ROWS = {"none": None, "number": (), "rows": (_M, 1)}
ANY = {**ROWS, "columns": (_N,), "row": (1, _N)}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("s", "t", "b"), list(itertools.product(ROWS, ANY, ANY)))
def test_the_bits_are_torchs(s: str, t: str, b: str, has_residual: bool, relu: bool) -> None:
    shapes = (ROWS[s], ANY[t], ANY[b], (_M, _N) if has_residual else None)
    given = [None if shape is None else _values(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    y = _values(_M, _N, seed=9)
    wanted = _wanted(y, *given, relu)
    held = y.clone()
    got = finish(held, *given, relu)
    assert _same(got, wanted)
    assert got is held


@pytest.mark.parametrize("threads", [1, 3])
def test_large_outputs_on_any_number_of_threads(threads: int) -> None:
    shapes = [(300, 200), (300, 1), (200,), (200,), (300, 200)]
    y, s, t, b, r = (_values(*shape, seed=seed) for seed, shape in enumerate(shapes))
    wanted = _wanted(y, s, t, b, r, True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert _same(finish(y.clone(), s, t, b, r, True), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "change",
    [lambda y: y.double(), lambda y: y.bfloat16(), lambda y: y.t().contiguous().t(), lambda y: y.view(1, _M, _N)],
    ids=["float64", "bf16", "strides", "dims"],
)
def test_what_the_kernel_does_not_serve_torch_does(change) -> None:  # type: ignore[no-untyped-def]
    y, b, r = change(_values(_M, _N, seed=1)), _values(_N, seed=2), change(_values(_M, _N, seed=3))
    assert torch.equal(finish(y, None, None, b, r, True).isnan(), _wanted(y, None, None, b, r, True).isnan())
    assert torch.equal(finish(y, None, None, b, r).nan_to_num(), _wanted(y, None, None, b, r, False).nan_to_num())


@pytest.mark.parametrize("shape", [(3, 1, _N), (3, _M, 1), (_M, _N)])
def test_scales_of_other_shapes_are_torchs(shape: tuple[int, ...]) -> None:
    y, t = _values(_M, _N, seed=1), _values(*shape, seed=2)
    assert _same(finish(y.clone(), None, t), y * t)


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogue, "epilogue_library", lambda: None)
    y, s, b = _values(_M, _N, seed=1), _values(_M, 1, seed=2), _values(_N, seed=3)
    assert _same(finish(y, s, None, b, None, True), _wanted(y, s, None, b, None, True))


def test_nothing_to_do_gives_the_product_and_an_empty_one_is_served() -> None:
    y = _values(_M, _N, seed=1)
    assert finish(y) is y
    assert finish(torch.empty(0, 4), torch.ones(()), None, torch.ones(4)).shape == (0, 4)
