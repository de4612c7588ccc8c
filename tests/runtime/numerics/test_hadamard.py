"""The Hadamard transform: the published vector, a matrix in float64, what turning both operands leaves of a product."""

import pytest
import torch
from torch import Tensor

from runtime.errors import FormatError
from runtime.numerics.hadamard import FIXED_SIGNS, parts, rotate, signs_of
from runtime.numerics.specs import GemmSpec, LayerSpec, QuantSpec
from runtime.numerics.transform_specs import TransformSpec

SIZES = (16, 32, 64, 128)


def _spec(text: str) -> QuantSpec:
    return QuantSpec.parse(f"e4m3 nearest_even {text}")


def _matrix(length: int, size: int, signs: Tensor) -> Tensor:
    """diag(s) H of every part, in float64, Sylvester's order written as bits: (-1) ^ |i and j|."""
    whole = torch.zeros(length, length, dtype=torch.float64)
    for at, count, n in parts(length, size):
        signed = [[float(signs[i]) * (-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
        for start in range(at, at + count, n):
            whole[start : start + n, start : start + n] = torch.tensor(signed, dtype=torch.float64) / n**0.5
    return whole


def test_the_published_vector() -> None:
    """algorithms.md A7: Transformer Engine's signs, H16 / 4."""
    x, spec = torch.tensor([8.0, *[0.3] * 15]), _spec("row hadamard16")
    assert spec.transform is not None
    y = rotate(x, spec, signs_of(spec.transform))
    wanted = "1.625 1.925 2.225 1.925 2.225 1.925 1.625 1.925 2.225 2.525 2.225 1.925 2.225 1.925 2.225 1.325"
    assert y.tolist() == pytest.approx([float(each) for each in wanted.split()], rel=1e-6)
    assert float(y.norm()) == pytest.approx(8.083935, rel=1e-6)
    assert FIXED_SIGNS == (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def test_how_an_axis_is_parted() -> None:
    assert list(parts(40, 16)) == [(0, 32, 16), (32, 8, 8)]
    assert list(parts(7, 16)) == [(0, 4, 4), (4, 2, 2), (6, 1, 1)]
    assert list(parts(17, 16)) == [(0, 16, 16), (16, 1, 1)]
    assert list(parts(128, 128)) == [(0, 128, 128)]
    assert list(parts(0, 16)) == []
    for length in range(300):
        for size in SIZES:
            found = list(parts(length, size))
            assert [at for at, _, _ in found] == [sum(n for _, n, _ in found[:i]) for i in range(len(found))]
            assert sum(count for _, count, _ in found) == length
            assert all(count % n == 0 for _, count, n in found)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [1, 7, 17, 40, 128, 200])
def test_it_is_the_matrix_and_leaves_a_product(size: int, length: int) -> None:
    source = torch.Generator().manual_seed(length)
    a, b = (torch.randn(5, length, generator=source, dtype=torch.float64) for _ in range(2))
    spec = _spec(f"row hadamard{size}[random]")
    assert spec.transform is not None
    signs = signs_of(spec.transform, seed=3, stream=length)
    matrix = _matrix(length, size, signs)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(length, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(rotate(a, spec, signs), a @ matrix, atol=1e-12, rtol=0)
    torch.testing.assert_close(rotate(a, spec, signs) @ rotate(b, spec, signs).t(), a @ b.t(), atol=1e-12, rtol=0)
    single = rotate(a.float(), spec, signs)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), a.float().double() @ matrix, atol=2e-6, rtol=0)


def test_which_way_it_lies() -> None:
    x = torch.randn(2, 20, 40)
    row, column, batched = (_spec(f"{along} hadamard16") for along in ("row", "column", "batched-column"))
    assert row.transform is not None
    signs = signs_of(row.transform)
    matrix = x.reshape(40, 40)
    assert torch.equal(rotate(x, column, signs), rotate(matrix.t(), row, signs).t().reshape(x.shape))
    assert torch.equal(rotate(x, batched, signs), rotate(x.mT, row, signs).mT)
    assert torch.equal(rotate(x, _spec("hadamard16"), signs), rotate(x, row, signs))


def test_rounding_to_bf16_is_last() -> None:
    x, spec = torch.randn(9, 40), _spec("row hadamard32[bf16]")
    assert spec.transform is not None
    signs = signs_of(spec.transform)
    y = rotate(x, spec, signs)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x, _spec("row hadamard32"), signs).bfloat16())


def test_random_signs_are_those_of_their_stream() -> None:
    t = TransformSpec("hadamard128", "random")
    first = signs_of(t, seed=1, step=2, stream=3)
    assert torch.equal(first, signs_of(t, seed=1, step=2, stream=3))
    others = [
        signs_of(t, seed=seed, step=step, stream=stream) for seed, step, stream in ((2, 2, 3), (1, 3, 3), (1, 2, 4))
    ]
    assert all(30 < int((first != other).sum()) < 98 for other in others)
    draws = torch.stack([signs_of(t, seed=seed) for seed in range(400)])
    assert draws.abs().eq(1).all()
    assert draws.mean(0).abs().max() < 5 / 20
    small = TransformSpec("hadamard16", "random")
    assert torch.equal(signs_of(small, seed=7), signs_of(t, seed=7)[:16]), "a smaller transform has the first of them"


def test_a_nan_reaches_those_it_is_turned_with() -> None:
    x = torch.ones(1, 48)
    x[0, 20] = torch.nan
    spec = _spec("row hadamard16")
    assert spec.transform is not None
    assert rotate(x, spec, signs_of(spec.transform)).isnan()[0].tolist() == [16 <= i < 32 for i in range(48)]


@pytest.mark.parametrize(
    "text",
    [
        "mxfp4 stochastic column hadamard32[random]",
        "e4m3 nearest_even tensor/amax row hadamard16[bf16]",
        "nvfp4:scale=eden stochastic hadamard128[random,bf16]",
        "nvfp4 nearest_even batched-column hadamard64",
        "psq5 stochastic hadamard16",
    ],
)
def test_a_spec_reads_as_it_prints(text: str) -> None:
    spec = QuantSpec.parse(text)
    assert str(spec) == text
    assert not spec.is_identity
    layer = LayerSpec(GemmSpec(spec, spec), GemmSpec(spec, spec), GemmSpec())
    assert LayerSpec.parse(str(layer)) == layer


def test_who_draws() -> None:
    for text, is_stochastic in (("hadamard16", False), ("hadamard16[random]", True), ("hadamard16[bf16]", False)):
        assert _spec(text).is_stochastic is is_stochastic


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("e4m3 nearest_even hadamard24", '"hadamard24" is not a transform'),
        ("e4m3 nearest_even hadamard16[odd]", '"odd" is not a rounding of a transform'),
        ("e4m3 nearest_even hadamard16[random", "is not a transform"),
        ("e4m3 nearest_even hadamard16 hadamard16", "is not a cast"),
        ("int8 nearest_even lsq hadamard16", "a quantizer that learns sees the operand as it is"),
        ("nvfp4:scale=eden stochastic row hadamard16[random]", "random rotations of 128 elements"),
        ("nvfp4:scale=eden stochastic row hadamard128", "random rotations of 128 elements"),
        ("nvfp4:scale=eden stochastic row", "random rotations of 128 elements"),
    ],
)
def test_what_is_no_transform_says_so(text: str, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        QuantSpec.parse(text)
