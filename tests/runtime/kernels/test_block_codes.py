"""Codes of block formats in C++ against the oracle, bit for bit."""

import itertools

import pytest
import torch

from runtime.errors import FormatError
from runtime.numerics import block_casts, decode_blocks, encode, encode_blocks, quantize
from runtime.numerics.block_formats import BLOCK_FORMATS, get_block_format
from runtime.numerics.codes import codes_of_grid
from runtime.numerics.formats import get_format
from runtime.numerics.specs import ROUNDINGS
from tests.machine_facts import needs_kernels
from tests.runtime.kernels.test_block_cast import ALL, hard_blocks, same_bits

pytestmark = needs_kernels
DRAW = {"seed": 3, "step": 2, "stream": 5, "offset": 7}


@pytest.mark.parametrize("name", ALL)
def test_codes_and_scales_are_those_of_the_oracle(name: str) -> None:
    for columns, mode, dtype in itertools.product(
        (128, 75, 5), ROUNDINGS, (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ):
        x = hard_blocks(columns).to(dtype)
        expected = block_casts.encode_blocks(x, name, mode, **DRAW)
        got = encode_blocks(x, name, mode, **DRAW)
        for part, wanted in zip(got, expected):
            assert part.dtype == wanted.dtype
            assert torch.equal(part, wanted), (columns, mode, dtype)
        values = decode_blocks(got.codes, got.scales, name, got.tensor_scale)
        assert same_bits(values, block_casts.decode_blocks(*got[:2], name, got.tensor_scale))
        if dtype == torch.float32:
            assert same_bits(values, quantize(x, name, mode, **DRAW))


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 40), (1, 9000), (700, 16)])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got, expected = encode_blocks(x, name), block_casts.encode_blocks(x, name)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert torch.equal(decode_blocks(got[0], got[1], name, got[2]), quantize(x, name))


@pytest.mark.parametrize("name", [name for name in BLOCK_FORMATS if name != "nvfp4-2d"])
def test_the_kernels_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the oracle ran")

    monkeypatch.setattr(block_casts, "encode_blocks", never)
    monkeypatch.setattr(block_casts, "decode_blocks", never)
    for x in (
        torch.randn(4, 64),
        torch.randn(4, 64).half(),
        torch.randn(64, 4).bfloat16().t(),
        torch.randn(4, 64)[:, ::2],
    ):
        decode_blocks(*encode_blocks(x, name)[:2], name)


def test_what_is_no_code_is_refused() -> None:
    scales = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(FormatError, match="not codes of e2m1"):
        decode_blocks(torch.full((32,), 16, dtype=torch.uint8), scales, "mxfp4")
    with pytest.raises(FormatError, match=r"Expected \(1,\)"):
        decode_blocks(torch.zeros(32, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), "mxfp4")
    with pytest.raises(FormatError, match="real numbers"):
        encode_blocks(torch.ones(32).long(), "mxfp4")


def test_a_row_of_ones_own() -> None:
    row = get_block_format("mxfp4:scale=rceil")
    x = torch.randn(3, 64)
    assert all(torch.equal(a, b) for a, b in zip(encode_blocks(x, row), encode_blocks(x, row.name)))


def test_in_a_graph() -> None:
    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        coded = encode_blocks(x, "nvfp4")
        return decode_blocks(coded.codes, coded.scales, "nvfp4", coded.tensor_scale)

    x = torch.randn(4, 40)
    assert torch.equal(torch.compile(there_and_back, backend="aot_eager", fullgraph=True)(x), there_and_back(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_codes_of_e8m0_are_exponents(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, -1.0, 2.0**-149, 2.0**-127, 2.0**-126, 2.0**127, torch.inf, -torch.inf, torch.nan, -torch.nan]
    x = torch.cat([torch.tensor(special), 2.0 ** torch.linspace(-140, 128, 999)]).to(dtype)
    row = get_format("e8m0")
    for mode in ROUNDINGS:
        expected = codes_of_grid(quantize(x, "e8m0", mode, **DRAW), row)
        assert torch.equal(encode(x, "e8m0", mode, **DRAW), expected), mode
